"""Parameters, FLOPs, memory and communication of a run, from its config alone; no torch."""
