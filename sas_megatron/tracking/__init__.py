"""Trackers of experiments (W&B, MLflow), which are fed from the records of a run."""
