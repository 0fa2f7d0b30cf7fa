"""Checks of the GPUs of a node: usable by torch, idle, and without memory errors."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import torch

from sas_megatron.preflight.finding import Finding, failure, fine, warning

MIB = 2**20
# A GPU with less memory in use counts as idle: drivers and display servers hold some.
IDLE_BYTES = 1024 * MIB
QUERY = "index,name,driver_version,memory.used,ecc.errors.uncorrected.volatile.total"


def check_gpus() -> Iterator[Finding]:
    """Compare the GPUs of nvidia-smi with those that torch can use; check memory use and ECC errors."""
    listed = _list_gpus()
    if not listed and not torch.cuda.is_available():
        yield fine("GPUs", "no GPUs; training runs on the CPU with gloo")
        return
    if not torch.cuda.is_available():
        yield failure(
            "GPUs",
            f"the driver {listed[0][2]} lists {len(listed)}, but torch {torch.__version__} cannot use them",
            "install torch for a CUDA version that the driver supports (see nvidia-smi), or a newer driver",
        )
        return
    names = sorted({torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())})
    driver = listed[0][2] if listed else "unknown"
    yield fine("GPUs", f"{torch.cuda.device_count()} × {', '.join(names)}, driver {driver}")
    for index, _, _, used, errors in listed:
        if used.isdigit() and int(used) * MIB > IDLE_BYTES:
            yield warning(
                "GPUs",
                f"GPU {index} has {used} MiB in use already",
                f"end the processes that use it: nvidia-smi -i {index} lists them",
            )
        if errors.isdigit() and int(errors) > 0:
            yield failure(
                "GPUs",
                f"GPU {index} has had {errors} uncorrected memory errors since it was started",
                "drain the node and reset or replace that GPU",
            )


def _list_gpus() -> list[list[str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []  # nvidia-smi is installed, but no driver is loaded
    return [[field.strip() for field in line.split(",")] for line in completed.stdout.splitlines() if line]
