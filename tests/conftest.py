"""Fixtures for all tests: ranks, started once for each world size, and a home of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.rank_pool import RankPool

os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(P)` is a pool of P processes."""
    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool_of
    for pool in pools.values():
        pool.close()
