"""How long each rank needs for a step by itself, and which one holds up the others.

In a collective all wait for the last, so that every rank's step takes as long as the slowest's. What is
measured is therefore this rank's own time: on a CPU, what its main thread ran or was ready to run (the
kernel's /proc/thread-self/schedstat); on a GPU, what kernels ran that are not NCCL's. Not in it is what
holds a rank up while it sleeps, such as a slow disk.
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


class OwnTime:
    """Measures the own seconds of what runs within `measure`, on this rank's device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = 0.0

    @contextlib.contextmanager
    def measure(self) -> Iterator[None]:
        """`seconds` is that of the block, once it is left; what it sets off on a GPU must be done by then."""
        if self._device.type == "cpu":
            before = _scheduled_seconds()
            yield
            self.seconds = _scheduled_seconds() - before
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


def _scheduled_seconds() -> float:
    """Of this thread, on a processor and in the queue for one."""
    running, waiting, _ = Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()
    return 1e-9 * (int(running) + int(waiting))


def find_stragglers(
    own_seconds: Sequence[float], stages: Sequence[int], *, excess: float
) -> dict[int, float]:
    """Rank -> its own time over the median of its stage, where that exceeds 1 by more than `excess`.

    Args:
        own_seconds: By rank.
        stages: By rank, its pipeline stage; stages have different work, the ranks of one the same.
        excess: As `health.straggler_excess`.
    """
    of_stage: dict[int, list[float]] = defaultdict(list)
    for stage, seconds in zip(stages, own_seconds, strict=True):
        of_stage[stage].append(seconds)
    # Of an even number the lower one: of two ranks the faster.
    medians = {stage: statistics.median_low(values) for stage, values in of_stage.items()}
    ratios = {
        rank: seconds / medians[stage]
        for rank, (stage, seconds) in enumerate(zip(stages, own_seconds, strict=True))
        if medians[stage] > 0
    }
    return {rank: ratio for rank, ratio in ratios.items() if ratio > 1 + excess}
