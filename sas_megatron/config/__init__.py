"""The config of a run: typed sections, YAML with dotted overrides, and user errors; imports no torch."""
