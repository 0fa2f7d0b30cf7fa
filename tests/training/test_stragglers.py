"""Stragglers: the rule that finds them, and a run with a slow rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from sas_megatron.training.stragglers import find_stragglers
from tests.small_data import SmallData
from tests.training.test_runs import records, summary
from tests.training.training_runs import complete_with_callback


def test_a_rank_is_compared_with_its_own_stage() -> None:
    assert find_stragglers([1.0, 1.1, 1.5, 4.0, 4.0, 4.1], [0, 0, 0, 1, 1, 1], excess=0.2) == {
        2: pytest.approx(1.5 / 1.1)
    }


def test_the_slower_of_two_ranks_is_compared_with_the_faster() -> None:
    assert find_stragglers([1.0, 2.0], [0, 0], excess=0.2) == {1: 2.0}
    assert find_stragglers([1.0, 1.1], [0, 0], excess=0.2) == {}


# Much longer than a step of this model, even on a busy machine.
SLOW_SECONDS = 1.2


def complete_with_slow_rank(config: RunConfig, slow_rank: int) -> None:
    """Complete a run on this rank; the slow rank computes for `SLOW_SECONDS` more in each step."""

    def compute(_run: Any) -> None:
        end = time.thread_time() + SLOW_SECONDS
        while time.thread_time() < end:
            pass

    complete_with_callback(config, slow_rank, compute)


def test_a_slow_rank_is_found_although_all_ranks_have_the_same_step_time(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = small_data.run(
        tmp_path / "run",
        training={"num_steps": 4, "micro_batch_size": 2},
        health={"straggler_interval": 2, "straggler_excess": 1.0},
    )
    ranks(2).run(complete_with_slow_rank, config, 1)
    events = records(config, "health")
    assert [(event["step"], event["event"]) for event in events] == [(step, "own_time") for step in (2, 4)]
    for event in events:
        assert list(event["stragglers"]) == ["1"]
        assert event["own_seconds_by_rank"][1] >= SLOW_SECONDS
    fast, slow = summary(config)["health"]["own_time_share_by_rank"]
    assert 0 < fast < slow / 2
    assert slow <= 1.01
