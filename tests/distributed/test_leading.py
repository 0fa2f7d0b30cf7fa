"""Rank 0 decides, all ranks compute: calls reach every rank, and an error of rank 0's ends all."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.errors import UserError


def led(fails: str) -> tuple[list[int], Any]:
    """On a rank: what it was called with, and what came of it."""
    import torch
    import torch.distributed as dist

    from sas_megatron.distributed.rank0_driver import lead

    called: list[int] = []

    def add_up(number: int) -> int:
        called.append(number)
        total = torch.tensor(number + dist.get_rank())
        dist.all_reduce(total)
        if fails == "in the function" and number == 10:
            raise UserError("field=1: is wrong; mend it")
        return int(total)

    def action(call: Any) -> list[int]:
        results = [call("add up", 1), call("add up", 10)]
        if fails == "by itself":
            raise UserError("field=1: is wrong; mend it")
        return results

    try:
        return called, lead(action, {"add up": add_up})
    except UserError as error:
        return called, str(error)


def test_calls_reach_every_rank_and_the_result_is_rank_0_s(ranks: Any) -> None:
    assert ranks(2).run(led, "") == [([1, 10], [3, 21]), ([1, 10], None)]


@pytest.mark.parametrize("fails", ["by itself", "in the function"])
def test_rank_0_s_error_is_met_by_all(ranks: Any, fails: str) -> None:
    assert ranks(2).run(led, fails) == [([1, 10], "field=1: is wrong; mend it")] * 2
