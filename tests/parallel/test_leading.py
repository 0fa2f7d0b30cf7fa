"""Rank 0 decides, all ranks compute: calls reach every rank, and an error of rank 0's ends all."""

from __future__ import annotations

from typing import Any

from sas_megatron.config.errors import UserError


def led(fails: bool) -> tuple[list[int], Any]:
    """On a rank: what it was called with, and what came of it."""
    import torch
    import torch.distributed as dist

    from sas_megatron.parallel.leading import lead

    called: list[int] = []

    def add_up(number: int) -> int:
        called.append(number)
        total = torch.tensor(number + dist.get_rank())
        dist.all_reduce(total)
        return int(total)

    def action(call: Any) -> list[int]:
        results = [call("add up", 1), call("add up", 10)]
        if fails:
            raise UserError("field=1: is wrong; mend it")
        return results

    try:
        return called, lead(action, {"add up": add_up})
    except UserError as error:
        return called, str(error)


def test_calls_reach_every_rank_and_the_result_is_rank_0_s(ranks: Any) -> None:
    assert ranks(2).run(led, False) == [([1, 10], [3, 21]), ([1, 10], None)]


def test_rank_0_s_error_is_met_by_all(ranks: Any) -> None:
    assert ranks(2).run(led, True) == [([1, 10], "field=1: is wrong; mend it")] * 2
