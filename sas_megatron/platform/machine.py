"""What a reader of results must know of the hardware; no torch."""

from __future__ import annotations

import os
from pathlib import Path


def describe_processor() -> dict[str, object]:
    """Model name (where the system tells) and number of processors."""
    names = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as information:
            names = [line.split(":", 1)[1].strip() for line in information if line.startswith("model name")]
    except OSError:
        pass  # not Linux
    return {"processor": names[0] if names else None, "processors": os.cpu_count()}


def read_memory_bytes(path: str, field: str) -> int:
    """A figure of /proc/meminfo or /proc/self/status, such as `MemTotal`, which they give in KiB."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    (kibibytes,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kibibytes) * 1024
