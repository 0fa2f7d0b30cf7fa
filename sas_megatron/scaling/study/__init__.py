"""Studies: many runs that differ in attention, size, budget and seed, from one file."""
