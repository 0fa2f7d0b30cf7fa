"""Benchmarks of attention, training steps, data preparation, checkpoints and scoring on one machine."""
