"""Driving all ranks from rank 0: calls reach every rank, and an error on rank 0 is raised on all ranks."""

from __future__ import annotations

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
