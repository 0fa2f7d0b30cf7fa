"""Time several actions in alternation, so that a drift of the machine's speed affects all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

# Prepares without being timed, and returns the action to time.
Preparation = Callable[[], Callable[[], object]]
WARM_UP_ROUNDS = 2
# Cycles for which a GPU waits, about ten milliseconds, while Python launches the kernels of the action. In
# training, launches run ahead of execution too. Without the wait, a pass of a tenth of that time would take
# as long as its launches.
HEAD_START_CYCLES = 20_000_000


def time_alternately(
    preparations: Mapping[str, Preparation], *, device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Time each action once per round.

    Args:
        preparations: Actions by name.
        device: On a GPU, time is measured by CUDA events.
        rounds: Number of rounds after the warm-up rounds.

    Returns:
        Seconds by name and round, without the warm-up rounds.
    """
    clock = _time_on_gpu if device.type == "cuda" else time_by_wall_clock
    seconds: dict[str, list[float]] = {name: [] for name in preparations}
    for round_number in range(WARM_UP_ROUNDS + rounds):
        for name, prepare in preparations.items():
            elapsed = clock(prepare())
            if round_number >= WARM_UP_ROUNDS:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios within rounds."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def time_by_wall_clock(action: Callable[[], object]) -> float:
    """Return the seconds of an action. Its result is freed after the time is taken."""
    start = time.perf_counter()
    result = action()
    seconds = time.perf_counter() - start
    del result
    return seconds


def _time_on_gpu(action: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    result = action()
    end.record()
    torch.cuda.synchronize()
    del result
    return float(start.elapsed_time(end)) / 1e3
