"""What the launcher tells a process of its place, before torch is imported."""

from __future__ import annotations

import os


def launched_world_size() -> int:
    """Ranks of this run, as the launcher's environment tells before any process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    """Whether this is rank 0, or a process alone."""
    return os.environ.get("RANK", "0") == "0"
