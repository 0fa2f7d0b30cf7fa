"""Simulated attention scores (SAS)."""
