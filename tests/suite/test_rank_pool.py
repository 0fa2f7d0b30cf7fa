"""A pool of ranks reports a failed rank immediately and replaces its processes for the next run."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import rank_pool
from tests.rank_pool import RankPool


def _sum(value: int, *, failing_rank: int | None = None) -> int:
    if dist.get_rank() == failing_rank:
        raise ValueError(f"no value for {value}")
    tensor = torch.tensor(value + dist.get_rank())
    dist.all_reduce(tensor)
    return int(tensor)


def _fail_on_last(value: int) -> int:
    return _sum(value, failing_rank=dist.get_world_size() - 1)


def _die_on_first(value: int) -> int:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return _sum(value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_fail_on_last, "rank 2:\n.*ValueError: no value for 5"),
        (_die_on_first, "rank 0:\nthe process has ended"),
    ],
)
def test_a_failed_rank_ends_the_wait_for_the_other_ranks(
    monkeypatch: pytest.MonkeyPatch, function: Any, message: str
) -> None:
    monkeypatch.setattr(rank_pool, "SECONDS_AFTER_FAILURE", 0.5)
    pool = RankPool(3)
    try:
        start_time = time.monotonic()
        with pytest.raises(AssertionError, match=f"(?s){message}"):
            pool.run(function, 5)
        assert time.monotonic() - start_time < 60, "without the pool, gloo would wait for half an hour"
        assert pool.run(_sum, 5) == [18, 18, 18]
    finally:
        pool.close()
