"""Atomic and synced file writes."""
