"""Rank 0 drives the other ranks, or works while they wait; its errors are raised on all ranks."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest

from sas_megatron.config.errors import UserError


def drive(failure: str) -> tuple[list[int], Any]:
    """Return a rank's arguments of the calls, and the result or the error message."""
    import torch
    import torch.distributed as dist

    from sas_megatron.distributed.object_collectives import drive_from_rank0

    called: list[int] = []

    def add_up(number: int) -> int:
        called.append(number)
        total = torch.tensor(number + dist.get_rank())
        dist.all_reduce(total)
        if failure == "in the function" and number == 10:
            raise UserError("field=1: is wrong; correct it")
        return int(total)

    def action(call: Any) -> list[int]:
        results = [call("add up", 1), call("add up", 10)]
        if failure == "in the action":
            raise UserError("field=1: is wrong; correct it")
        return results

    try:
        return called, drive_from_rank0(action, {"add up": add_up})
    except UserError as error:
        return called, str(error)


def test_calls_reach_every_rank_and_return_the_result_of_rank_0(ranks: Any) -> None:
    assert ranks(2).run(drive, "") == [([1, 10], [3, 21]), ([1, 10], None)]


@pytest.mark.parametrize("failure", ["in the action", "in the function"])
def test_an_error_on_rank_0_is_raised_on_all_ranks(ranks: Any, failure: str) -> None:
    assert ranks(2).run(drive, failure) == [([1, 10], "field=1: is wrong; correct it")] * 2


def wait_for_rank0(seconds: float, fails: bool) -> str:
    """Run an action of `seconds` on rank 0, on ranks whose collectives may take 0.5 s."""
    from torch.distributed.distributed_c10d import _set_pg_timeout

    from sas_megatron.distributed.object_collectives import run_long_on_rank0

    def act() -> str:
        time.sleep(seconds)
        if fails:
            raise UserError("cannot be built")
        return "built"

    _set_pg_timeout(timedelta(seconds=0.5))
    try:
        return run_long_on_rank0(act)
    except UserError as error:
        return f"{error}"
    finally:
        _set_pg_timeout(timedelta(minutes=10))


@pytest.mark.parametrize(("fails", "result"), [(False, "built"), (True, "cannot be built")])
def test_an_action_of_rank_0_may_exceed_the_timeout_of_collectives(
    ranks: Any, fails: bool, result: str
) -> None:
    # The second call shows that a key of the first one is not taken for its own.
    for _ in range(2):
        assert ranks(2).run(wait_for_rank0, 1.2, fails) == [result] * 2
