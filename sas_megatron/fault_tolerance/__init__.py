"""Failure detection and reports for multi-rank runs."""
