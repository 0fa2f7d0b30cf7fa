"""What tests start as a user would, and how its processes are found again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from tests.conftest import ROOT


def environment_with(**variables: str) -> dict[str, str]:
    """This one, with the commands of this interpreter first, as in an entered virtual environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables}


def processes_with(**variables: str) -> list[int]:
    """Those that have these variables in their environment."""
    wanted = {f"{name}={value}" for name, value in variables.items()}
    own = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [pid for pid in own if wanted <= _environment(pid)]


def _environment(pid: int) -> set[str]:
    try:
        return set(Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"))
    except OSError:
        return set()  # it has ended, or is another user's
