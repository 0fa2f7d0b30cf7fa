"""Estimate the memory, the operations, the communication and the step time of a run without its cluster."""
