"""Preflight checks of all ranks of an allocation."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sas_megatron.preflight.allocation import check_allocation, judge_clocks, judge_pairs, rounds_of_pairs
from sas_megatron.preflight.finding import Finding, Severity
from sas_megatron.preflight.software import compare_versions
from tests.end_to_end.test_launching import shell
from tests.fork_server import ForkedCommand
from tests.preflight.test_node import doctor
from tests.rank_pool import RankPool

MARGIN_SECONDS = 50  # for a busy machine


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8])
def test_each_pair_occurs_in_one_round_and_each_rank_once_per_round(world_size: int) -> None:
    rounds = list(rounds_of_pairs(world_size))
    pairs = [tuple(sorted(pair)) for partners in rounds for pair in partners.items()]
    assert sorted(pairs) == sorted(2 * list(itertools.combinations(range(world_size), 2)))
    assert len(rounds) == world_size + world_size % 2 - 1
    for partners in rounds:
        assert all(partners[partners[rank]] == rank for rank in partners)


def _check(directory: Path) -> list[Finding]:
    return list(check_allocation(torch.device("cpu"), directory))


def _check_with_a_memory_error(directory: Path) -> list[Finding]:
    """Run the checks with an error of one float32 step in one element that rank 1 receives."""
    all_reduce = dist.all_reduce

    def corrupting_all_reduce(tensor: torch.Tensor) -> None:
        all_reduce(tensor)
        if dist.get_rank() == 1 and tensor.numel() > 1000:
            tensor[777] = torch.nextafter(tensor[777], torch.tensor(0.0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", corrupting_all_reduce)
        return _check(directory)


def test_healthy_ranks_pass_all_checks(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    first, *others = ranks(3).run(_check, tmp_path / "run")
    found = {each.check: each for each in first}
    assert list(found) == ["equal software", "clocks", "shared directory", "all-reduce", "pairs"]
    assert all(each.verdict != Severity.FAILURE for each in first)
    assert "gloo sums correctly on 3 ranks" in found["all-reduce"].observed
    assert "over 3 pairs" in found["pairs"].observed
    assert found["shared directory"].observed == f"all ranks see {tmp_path}"
    assert not list(tmp_path.iterdir()), "the checks must delete their files"
    for other in others:
        assert [each.check for each in other] == list(found)


def test_a_rank_with_a_wrong_sum_is_named(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    for findings in ranks(3).run(_check_with_a_memory_error, tmp_path):
        (found,) = [each for each in findings if each.check == "all-reduce"]
        assert found.verdict == Severity.FAILURE
        assert "a wrong sum on rank 1 on " in found.observed
        assert "rank 0" not in found.observed


def test_a_slow_pair_and_a_clock_ahead_are_named() -> None:
    names = ["rank 0 on a", "rank 1 on b", "rank 2 on c"]
    speeds = {(0, 1): 9e8, (1, 0): 9e8, (0, 2): 1e9, (2, 0): 1e9, (1, 2): 2e8, (2, 1): 2e8}
    found = judge_pairs(speeds, names)
    assert found.verdict == Severity.WARNING
    assert "between rank 1 on b and rank 2 on c" in found.observed
    assert judge_pairs({**speeds, (1, 2): 4e8, (2, 1): 4e8}, names).verdict == Severity.FINE

    found = judge_clocks([0.0, 0.1, -3.2], names)
    assert found.verdict == Severity.WARNING
    assert found.observed == "rank 2 on c is 3.20 s behind rank 0"
    assert judge_clocks([0.0, 0.1, -0.2], names).verdict == Severity.FINE


def test_different_software_on_a_node_is_a_failure() -> None:
    found = compare_versions({"a": {"torch": "2.13.0"}, "b": {"torch": "2.13.0"}, "c": {"torch": "2.12.0"}})
    assert found.verdict == Severity.FAILURE
    assert found.observed == "torch is 2.13.0 on a and 2.12.0 on c"


def test_a_rank_that_cannot_reach_rank_0_reports_it_in_time() -> None:
    variables = {
        "JOIN_SECONDS": "3",
        "RANK": "1",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "9",
    }
    started = time.monotonic()
    status, found = doctor(**variables)
    assert status == 1
    assert "rank 1 on " in found["allocation"]["observed"]
    assert "firewall" in found["allocation"]["remedy"]
    assert time.monotonic() - started < 3 + MARGIN_SECONDS


@pytest.mark.parametrize("launcher", ["forked", pytest.param("torchrun", marks=pytest.mark.exhaustive)])
def test_an_allocation_is_checked_and_reported_once(launcher: str, tmp_path: Path) -> None:
    arguments = ("sas_megatron", "doctor", "--json", "--run-directory", str(tmp_path / "run"))
    if launcher == "torchrun":
        completed = shell("torchrun", "--standalone", "--nproc-per-node=2", "-m", *arguments)
        status, printed, errors = completed.returncode, completed.stdout, completed.stderr
    else:
        ranks = ForkedCommand(tmp_path / "pids", 2, *arguments, module="tests.end_to_end.fork_launcher")
        status, printed, errors = ranks.wait(120), ranks.output(), ranks.errors()
    assert status == 0, errors
    record = json.loads(printed)
    assert (record["ranks"], record["verdict"] != "failure") == (2, True)
    checks = [found["check"] for found in record["findings"]]
    assert checks.count("all-reduce") == checks.count("open files") == checks.count("rendezvous") == 1
