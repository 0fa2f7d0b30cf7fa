"""Starting one run's processes on this machine, as quickstart and studies do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def training_command(config: Path, *, ranks: int) -> list[str]:
    """What trains a config on so many processes of this machine."""
    train = ["-m", "sas_megatron", "train", str(config)]
    if ranks == 1:
        return [sys.executable, *train]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return [sys.executable, *torchrun, f"--nproc-per-node={ranks}", *train]


def training_environment(*, ranks: int, side_by_side: int = 1) -> dict[str, str]:
    """This process's variables, with the processors shared out among all processes of the runs.

    With fewer GPUs than ranks all compute on the CPU, so that runs are comparable.
    """
    threads = max(1, (os.cpu_count() or 1) // (ranks * side_by_side))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if count_gpus() < ranks:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def count_gpus() -> int:
    """GPUs that nvidia-smi lists; 0 without it. Asking torch would take seconds."""
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
