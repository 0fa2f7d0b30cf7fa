"""A process that is in no process group, to simulate ranks in."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

Simulator = Callable[..., Any]


def _prepare() -> None:
    from sas_megatron.platform.device import prepare_device

    prepare_device()


@pytest.fixture(scope="session")
def simulator() -> Iterator[Simulator]:
    """`simulator(function, *args)` is what the function returns in that process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=_prepare) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
