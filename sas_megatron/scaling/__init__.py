"""Fair matching and comparison of runs. No torch here."""
