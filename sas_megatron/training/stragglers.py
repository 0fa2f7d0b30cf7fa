"""Measures the compute time of each rank in a step and finds the ranks that delay the others.

In a collective all ranks wait for the last one, so that the step takes the same elapsed time on every rank.
The compute time excludes this waiting. On a CPU it is the time that the main thread ran or was ready to run
(the kernel's /proc/thread-self/schedstat); on a GPU it is the time of all kernels except NCCL's. It also
excludes delays during which the thread sleeps, for example waiting for a slow disk.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class ComputeTimer:
    """Measures the compute time of a block on this rank's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """Set `seconds` when the block ends; all GPU work that it launches must be complete by then."""
        if self._device.type == "cpu":
            before = _read_scheduled_seconds()
            yield
            self.seconds = _read_scheduled_seconds() - before
            return
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            yield
        self.seconds = 1e-6 * sum(
            event.time_range.elapsed_us()
            for event in profiled.events()
            if event.device_type == DeviceType.CUDA
            and not event.is_user_annotation
            and not event.name.startswith("nccl")
        )


def _read_scheduled_seconds() -> float:
    """Return the time that this thread ran on a processor or waited in a run queue."""
    running, waiting, _ = Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()
    return 1e-9 * (int(running) + int(waiting))


def find_stragglers(
    compute_seconds: Sequence[float], stages: Sequence[int], *, excess: float
) -> dict[int, float]:
    """Return, by rank, the ratios of compute time to the stage's median that exceed 1 + `excess`.

    Args:
        compute_seconds: The compute time of each rank.
        stages: The pipeline stage of each rank; only ranks of the same stage have equal work.
        excess: The share that `health.straggler_excess` allows.
    """
    by_stage: dict[int, list[float]] = defaultdict(list)
    for stage, seconds in zip(stages, compute_seconds, strict=True):
        by_stage[stage].append(seconds)
    # The lower median, so that the slower of two ranks is compared with the faster.
    medians = {stage: statistics.median_low(values) for stage, values in by_stage.items()}
    ratios = {
        rank: seconds / medians[stage]
        for rank, (stage, seconds) in enumerate(zip(stages, compute_seconds, strict=True))
        if medians[stage] > 0
    }
    return {rank: ratio for rank, ratio in ratios.items() if ratio > 1 + excess}
