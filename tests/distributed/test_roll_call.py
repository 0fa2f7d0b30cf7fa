"""The roll call alone: bare processes on a store that rank 0 hosts, without a launcher or collectives."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sas_megatron.fault_tolerance.failure_watchdog import GRACE_SECONDS, SECONDS_BETWEEN_LOOKS
from tests.fork_server import ForkedCommand

HOST = socket.gethostname()


class Rank(ForkedCommand):
    """A process of `roll_call_rank`."""

    def __init__(self, rank: int, world_size: int, port: int, act: str, folder: Path) -> None:
        self._go = folder / f"go {rank}"
        super().__init__(
            *(rank, world_size, port, act, self._go),
            module="tests.distributed.roll_call_rank",
            environment={**os.environ, "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"},
        )

    def port(self) -> int:
        """Wait until the rank is inside the roll call; return the port of its store."""
        while "\n" not in self.output():
            assert self.poll() is None, self.errors()
            time.sleep(0.02)
        word, port = self.output().split()
        assert word == "ready"
        return int(port)

    def go(self) -> None:
        """Let the rank act."""
        self._go.touch()


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """Starts one rank for each act; all are inside the block when it returns."""
    started: list[Rank] = []

    def start(*acts: str) -> list[Rank]:
        port = 0
        for rank, act in enumerate(acts):
            started.append(Rank(rank, len(acts), port, act, tmp_path))
            port = started[-1].port()
        return started

    yield start
    for process in started:
        process.kill()


def end(process: Rank, within: float = 4 * GRACE_SECONDS) -> tuple[int, str, str]:
    """Wait for the process; return its status, its output after the first line, and its errors."""
    status = process.wait(timeout=within)
    return status, process.output().partition("\n")[2], process.errors()


def test_a_run_without_faults_prints_nothing(start_ranks: Callable[..., list[Rank]]) -> None:
    first, last = start_ranks("leave", "leave")
    first.go()
    time.sleep(1.5 * SECONDS_BETWEEN_LOOKS)  # the last rank looks at the store again, which the first hosts
    last.go()
    for process in (first, last):
        assert end(process) == (0, "left\n", "")


def test_an_error_ends_ranks_that_wait_in_no_collective(start_ranks: Callable[..., list[Rank]]) -> None:
    reporter, hanging, failing = start_ranks("hang", "hang", "fail")
    for process in (reporter, hanging, failing):
        process.go()
    status, _, errors = end(failing)
    assert status == 1
    assert errors.startswith(f"sas-megatron: rank 2 on {HOST}:\nTraceback")
    assert end(hanging) == (1, "", "")
    status, _, errors = end(reporter)
    assert status == 1
    assert errors == (
        f"sas-megatron: training stopped after step 3: rank 2 on {HOST} (last finished step 3) failed: "
        "ValueError: no good; go on from the last checkpoint with checkpoint.resume=true\n"
    )


def test_an_error_that_all_ranks_raise_is_printed_once_and_without_delay(
    start_ranks: Callable[..., list[Rank]],
) -> None:
    processes = start_ranks("fail", "fail")
    started = time.monotonic()
    for process in processes:
        process.go()
    first, second = map(end, processes)
    assert time.monotonic() - started < GRACE_SECONDS
    assert first[2].count("Traceback") == 1
    assert first[2].count("training stopped") == 1
    assert second == (1, "", "")


def test_a_user_error_is_raised_unchanged(start_ranks: Callable[..., list[Rank]]) -> None:
    for process in start_ranks("user error", "user error"):
        process.go()
        status, _, errors = end(process)
        assert status == 1, "an error that nobody caught"
        assert errors.endswith("FieldError: data.prefixes=x: is missing; give another\n")
        assert "training stopped" not in errors


def test_an_interrupt_ends_all_ranks_without_a_traceback(start_ranks: Callable[..., list[Rank]]) -> None:
    first, second = start_ranks("leave", "leave")
    second.send_signal(signal.SIGINT)
    status, _, errors = end(first)
    assert status == 1
    assert f"rank 1 on {HOST} (last finished step 2) received SIGINT; go on" in errors
    assert end(second) == (1, "", "")


def test_a_handled_signal_ends_no_rank_while_all_ranks_answer(
    start_ranks: Callable[..., list[Rank]],
) -> None:
    first, second = start_ranks("take", "hang")
    second.go()  # its main thread would answer nothing
    first.send_signal(signal.SIGUSR1)
    # A rank that took the signal as an order would end after the muster and another grace.
    time.sleep(2 * GRACE_SECONDS + 3)
    assert (first.poll(), second.poll()) == (None, None)
    first.send_signal(signal.SIGUSR1)
    status, _, errors = end(first)
    assert status == 1
    assert f"rank 0 on {HOST} (last finished step 1) received SIGUSR1; go on" in errors
    assert end(second) == (1, "", "")


def test_a_handled_signal_ends_all_ranks_if_one_was_killed(start_ranks: Callable[..., list[Rank]]) -> None:
    first, second = start_ranks("take", "take")
    second.kill()
    first.send_signal(signal.SIGTERM)  # as torchrun does then
    status, _, errors = end(first)
    assert status == 1
    assert f"rank 1 on {HOST} (last finished step 2) did not answer, being dead or hung" in errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_failing_rank_ends_although_the_store_is_lost(
    start_ranks: Callable[..., list[Rank]], number: signal.Signals
) -> None:
    host, first, second = start_ranks("leave", "leave", "fail")
    host.send_signal(number)
    time.sleep(2.5)  # the others have looked at the store since
    assert (first.poll(), second.poll()) == (None, None), "a lost store alone ends nothing"
    second.go()
    status, _, errors = end(second)
    assert status == 1
    assert "ValueError: no good" in errors
