"""What a run is: typed sections, YAML with dotted overrides, errors a user can mend. No torch here."""
