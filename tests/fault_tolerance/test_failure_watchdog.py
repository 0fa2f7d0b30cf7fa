"""The failure watchdog in processes without a launcher or collectives, with a store that rank 0 hosts."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sas_megatron.fault_tolerance.failure_watchdog import GRACE_SECONDS, POLL_SECONDS
from tests.fork_server import ForkedCommand

HOST = socket.gethostname()


class Rank(ForkedCommand):
    """A process that runs `watchdog_rank`."""

    def __init__(self, rank: int, world_size: int, port: int, behaviour: str, folder: Path) -> None:
        self._start_file = folder / f"start {rank}"
        super().__init__(
            *(rank, world_size, port, behaviour, self._start_file),
            module="tests.fault_tolerance.watchdog_rank",
            environment={**os.environ, "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"},
        )

    def port(self) -> int:
        """Wait until the rank has entered the watchdog; return the port of its store."""
        while "\n" not in self.output():
            assert self.poll() is None, self.errors()
            time.sleep(0.02)
        word, port = self.output().split()
        assert word == "ready"
        return int(port)

    def start(self) -> None:
        """Let the rank start its behaviour."""
        self._start_file.touch()


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Callable[..., list[Rank]]]:
    """Return a function that starts one rank per behaviour and waits until all have entered the watchdog."""
    started: list[Rank] = []

    def start(*behaviours: str) -> list[Rank]:
        port = 0
        for rank, behaviour in enumerate(behaviours):
            started.append(Rank(rank, len(behaviours), port, behaviour, tmp_path))
            port = started[-1].port()
        return started

    yield start
    for process in started:
        process.kill()


def wait_for_end(process: Rank, within: float = 4 * GRACE_SECONDS) -> tuple[int, str, str]:
    """Wait for the process; return its status, its output after the first line, and its errors."""
    status = process.wait(timeout=within)
    return status, process.output().partition("\n")[2], process.errors()


def test_a_run_without_faults_prints_nothing(start_ranks: Callable[..., list[Rank]]) -> None:
    first, last = start_ranks("leave", "leave")
    first.start()
    time.sleep(1.5 * POLL_SECONDS)  # the last rank polls the store on the first one again
    last.start()
    for process in (first, last):
        assert wait_for_end(process) == (0, "left\n", "")


def test_an_error_ends_ranks_that_wait_in_no_collective(start_ranks: Callable[..., list[Rank]]) -> None:
    reporter, hanging, failing = start_ranks("hang", "hang", "fail")
    for process in (reporter, hanging, failing):
        process.start()
    status, _, errors = wait_for_end(failing)
    assert status == 1
    assert errors.startswith(f"sas-megatron: rank 2 on {HOST}:\nTraceback")
    assert wait_for_end(hanging) == (1, "", "")
    status, _, errors = wait_for_end(reporter)
    assert status == 1
    assert errors == (
        f"sas-megatron: training stopped after step 3: rank 2 on {HOST} (last finished step 3) failed: "
        "ValueError: no good; resume from the last checkpoint with checkpoint.resume=true\n"
    )


def test_an_error_that_all_ranks_raise_is_printed_once_and_without_delay(
    start_ranks: Callable[..., list[Rank]],
) -> None:
    processes = start_ranks("fail", "fail")
    started = time.monotonic()
    for process in processes:
        process.start()
    first, second = map(wait_for_end, processes)
    assert time.monotonic() - started < GRACE_SECONDS
    assert first[2].count("Traceback") == 1
    assert first[2].count("training stopped") == 1
    assert second == (1, "", "")


def test_a_user_error_is_raised_unchanged(start_ranks: Callable[..., list[Rank]]) -> None:
    for process in start_ranks("user error", "user error"):
        process.start()
        status, _, errors = wait_for_end(process)
        assert status == 1, "the exit status of an uncaught error"
        assert errors.endswith("FieldError: data.prefixes=x: is missing; give another\n")
        assert "training stopped" not in errors


def test_an_interrupt_ends_all_ranks_without_a_traceback(start_ranks: Callable[..., list[Rank]]) -> None:
    first, second = start_ranks("leave", "leave")
    second.send_signal(signal.SIGINT)
    status, _, errors = wait_for_end(first)
    assert status == 1
    assert f"rank 1 on {HOST} (last finished step 2) received SIGINT; resume" in errors
    assert wait_for_end(second) == (1, "", "")


def test_a_handled_signal_ends_no_rank_while_all_ranks_are_alive(
    start_ranks: Callable[..., list[Rank]],
) -> None:
    first, second = start_ranks("handle a signal", "hang")
    second.start()  # its main thread cannot confirm that it is alive
    first.send_signal(signal.SIGUSR1)
    # A rank that did not handle the signal would end after the alive check and one more grace period.
    time.sleep(2 * GRACE_SECONDS + 3)
    assert (first.poll(), second.poll()) == (None, None)
    first.send_signal(signal.SIGUSR1)
    status, _, errors = wait_for_end(first)
    assert status == 1
    assert f"rank 0 on {HOST} (last finished step 1) received SIGUSR1; resume" in errors
    assert wait_for_end(second) == (1, "", "")


def test_a_handled_signal_ends_all_ranks_if_one_was_killed(start_ranks: Callable[..., list[Rank]]) -> None:
    first, second = start_ranks("handle a signal", "handle a signal")
    second.kill()
    first.send_signal(signal.SIGTERM)  # as torchrun does then
    status, _, errors = wait_for_end(first)
    assert status == 1
    assert f"rank 1 on {HOST} (last finished step 2) reported no status (dead or hung)" in errors


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_failing_rank_ends_even_if_the_store_is_lost(
    start_ranks: Callable[..., list[Rank]], number: signal.Signals
) -> None:
    host, first, second = start_ranks("leave", "leave", "fail")
    host.send_signal(number)
    time.sleep(2.5)  # the others have polled the store since
    assert (first.poll(), second.poll()) == (None, None), "a lost store alone ends nothing"
    second.start()
    status, _, errors = wait_for_end(second)
    assert status == 1
    assert "ValueError: no good" in errors
