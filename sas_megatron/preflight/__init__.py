"""Checks before a run: of this node, and of all ranks of an allocation."""
