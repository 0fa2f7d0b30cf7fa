"""The local machine: processors, memory, GPUs, and the command that trains on it. Imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def describe_processor() -> dict[str, object]:
    """Return the model name of the processor, None if the system does not state it, and their number."""
    names = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        pass  # not Linux
    return {"processor": names[0] if names else None, "processors": os.cpu_count()}


def read_memory_bytes(path: str, field: str) -> int:
    """Return a field such as `MemTotal` of /proc/meminfo or /proc/self/status, in bytes."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    (kibibytes,) = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(kibibytes) * 1024


class OtherLoad:
    """Measures the processors that other processes use, from the construction on.

    The processes that this process has started count as others until it has waited for their end.
    """

    def __init__(self) -> None:
        self._started, self._busy, self._own = time.monotonic(), _read_busy_seconds(), _read_own_seconds()

    def measure(self) -> float | None:
        """Return the mean number of processors in use by others since the start; None if it is not known."""
        busy = _read_busy_seconds()
        if busy is None or self._busy is None:
            return None
        others = (busy - self._busy) - (_read_own_seconds() - self._own)
        return max(0.0, others / max(time.monotonic() - self._started, 1e-9))


def _read_busy_seconds() -> float | None:
    """Return the processor seconds of all processes since the machine started; None if not on Linux."""
    try:
        words = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal, in clock ticks. Other virtual machines steal processors.
    user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(int, words[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _read_own_seconds() -> float:
    return sum(os.times()[:4])


def count_gpus() -> int:
    """Return the number of GPUs that nvidia-smi lists, 0 without it. (Importing torch takes seconds.)"""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, encoding="utf-8", errors="replace", timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0


def training_command(config: Path, *, ranks: int) -> list[str]:
    """Return the command that trains a config with `ranks` processes on this machine."""
    train = ["-m", "sas_megatron", "train", str(config)]
    if ranks == 1:
        return [sys.executable, *train]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    # Without a folder for logs, torchrun would leave an empty one among the temporary files.
    torchrun += ["--log-dir", os.devnull, f"--nproc-per-node={ranks}"]
    return [sys.executable, *torchrun, *train]


def training_environment(*, ranks: int, num_concurrent_runs: int = 1) -> dict[str, str]:
    """Return this process's environment for `training_command`, with the processors divided among ranks.

    With fewer GPUs than ranks, all ranks compute on the CPU, so that runs are comparable.

    Args:
        ranks: Processes of each run.
        num_concurrent_runs: Runs on this machine at the same time.
    """
    threads = max(1, (os.cpu_count() or 1) // (ranks * num_concurrent_runs))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if count_gpus() < ranks:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment
