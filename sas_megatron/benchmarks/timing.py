"""Seconds of what is compared, taken in turn, so that a machine that drifts drifts for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

# Prepares, untimed, and returns what is timed.
Preparation = Callable[[], Callable[[], object]]
WARM_UP_ROUNDS = 2
# Some ten milliseconds for a GPU to wait, in which Python launches what is timed, as it is ahead in training.
# Otherwise a pass of a tenth of that would be as long as its launches take.
HEAD_START_CYCLES = 20_000_000


def time_in_turn(
    preparations: Mapping[str, Preparation], *, device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Seconds by name, of each round after those that warm up; by the device's own clock on a GPU."""
    clock = _time_on_gpu if device.type == "cuda" else time_by_wall_clock
    seconds: dict[str, list[float]] = {name: [] for name in preparations}
    for round_number in range(WARM_UP_ROUNDS + rounds):
        for name, prepare in preparations.items():
            elapsed = clock(prepare())
            if round_number >= WARM_UP_ROUNDS:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Of neighbouring runs."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def time_by_wall_clock(action: Callable[[], object]) -> float:
    """Seconds of an action; what it returns is let go after them."""
    begun = time.perf_counter()
    kept = action()
    seconds = time.perf_counter() - begun
    del kept
    return seconds


def _time_on_gpu(action: Callable[[], object]) -> float:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    begun.record()
    kept = action()
    ended.record()
    torch.cuda.synchronize()
    del kept
    return float(begun.elapsed_time(ended)) / 1e3
