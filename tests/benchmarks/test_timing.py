"""Actions are timed in alternation, and warm-up rounds are left out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sas_megatron.benchmarks import timing
from sas_megatron.benchmarks.timing import WARM_UP_ROUNDS, median_ratio, time_alternately


def test_rounds_alternate_and_warm_up_rounds_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []

    def clock(action: Callable[[], object]) -> float:
        action()
        return float(len(timed))

    monkeypatch.setattr(timing, "time_by_wall_clock", clock)
    preparations = {name: lambda name=name: lambda: timed.append(name) for name in "ab"}
    seconds = time_alternately(preparations, device=torch.device("cpu"), rounds=3)
    assert timed == ["a", "b"] * (WARM_UP_ROUNDS + 3)
    first = 2 * WARM_UP_ROUNDS + 1
    assert seconds == {"a": [first, first + 2, first + 4], "b": [first + 1, first + 3, first + 5]}


def test_the_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    assert median_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 8.0]) == 2.0
