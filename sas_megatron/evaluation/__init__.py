"""Held-out loss of a trained model."""
