"""Differential attention, second version."""
