"""What a reader of results must know of the hardware; no torch."""

from __future__ import annotations

import os


def describe_processor() -> dict[str, object]:
    """Model name (where the system tells) and number of processors."""
    names = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as information:
            names = [line.split(":", 1)[1].strip() for line in information if line.startswith("model name")]
    except OSError:
        pass  # not Linux
    return {"processor": names[0] if names else None, "processors": os.cpu_count()}
