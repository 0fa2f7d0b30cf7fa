"""What a run is: typed sections, YAML with dotted overrides, and the errors a user can mend. No torch here."""
