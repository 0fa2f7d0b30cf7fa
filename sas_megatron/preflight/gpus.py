"""GPUs of a node: seen by torch as by the driver, idle, without errors."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import torch

from sas_megatron.preflight.finding import Finding, failure, fine, warning

MIB = 2**20
IDLE_BYTES = 1024 * MIB
QUERY = "index,name,driver_version,memory.used,ecc.errors.uncorrected.volatile.total"


def check_gpus() -> Iterator[Finding]:
    """What nvidia-smi lists against what torch can use; on a node without GPUs, that it has none."""
    listed = _list_gpus()
    if not listed and not torch.cuda.is_available():
        yield fine("GPUs", "none; training computes on the CPU, in processes that gloo connects")
        return
    if not torch.cuda.is_available():
        yield failure(
            "GPUs",
            f"the driver {listed[0][2]} lists {len(listed)}, and torch {torch.__version__} cannot use them",
            "install a torch whose CUDA the driver supports, or update the driver (nvidia-smi shows which)",
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
                f"end what uses it: nvidia-smi -i {index} lists the processes",
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
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []  # the tool is there without a driver
    return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line]
