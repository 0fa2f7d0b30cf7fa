"""The environment of commands that tests start, and a search for their processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.conftest import ROOT


def environment_with(**variables: str) -> dict[str, str]:
    """Return this environment with the commands of this interpreter first in PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables}


def processes_with(**variables: str) -> list[int]:
    """Return the processes that have these variables in their environment."""
    required = {f"{name}={value}" for name, value in variables.items()}
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in pids if required <= _environment(pid)]


def _environment(pid: int) -> set[str]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
    except OSError:
        return set()  # it has ended, or belongs to another user
