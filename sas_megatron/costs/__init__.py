"""Parameters, FLOPs, memory and communication of a run, computed from its config alone, without torch."""
