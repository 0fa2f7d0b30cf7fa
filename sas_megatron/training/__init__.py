"""Assemble, loop, step; schedules and metrics."""
