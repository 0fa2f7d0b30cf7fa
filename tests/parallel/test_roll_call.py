"""The roll call alone: bare processes on a store that rank 0 hosts, without a launcher or collectives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from sas_megatron.parallel.roll_call import GRACE_SECONDS, SECONDS_BETWEEN_LOOKS
from tests.conftest import ROOT

HOST = socket.gethostname()

# A rank that says when it is ready, and then does as it is told.
# A shell starts background jobs, tests among them, with SIGINT ignored, and children inherit it.
RANK = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from torch.distributed import TCPStore
from sas_megatron.config.errors import FieldError
from sas_megatron.parallel.roll_call import RollCall
rank, world_size, port, act = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
def spin():
    while True:
        pass
taken = []
def takes_signal(number):
    taken.append(number)
    return act == "take" and len(taken) == 1
with RollCall(
    store, rank=rank, world_size=world_size, timeout_minutes=1, takes_signal=takes_signal
) as roll_call:
    roll_call.finish_step(rank + 1)
    print("ready", store.port, flush=True)
    sys.stdin.readline()
    if act == "mend":
        raise FieldError("data.prefixes", "x", "is missing", "give another")
    if act == "fail":
        raise ValueError("no good")
    if act == "spin":
        spin()
print("left", flush=True)
"""

Rank = subprocess.Popen[str]


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., list[Rank]]]:
    """Starts one rank for each act; all are inside the block when it returns."""
    started: list[Rank] = []

    def start(*acts: str) -> list[Rank]:
        port = 0
        for rank, act in enumerate(acts):
            process = subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(len(acts)), str(port), act],
                cwd=ROOT,
                env={**os.environ, "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
            assert process.stdout is not None
            word, port = process.stdout.readline().split()
            assert word == "ready"
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def go(process: Rank) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def end(process: Rank, within: float = 4 * GRACE_SECONDS) -> tuple[int, str, str]:
    # Not communicate(), which would close its input and so let it go.
    status = process.wait(timeout=within)
    assert process.stdout is not None
    assert process.stderr is not None
    return status, process.stdout.read(), process.stderr.read()


def test_a_run_without_faults_leaves_no_word(start_ranks: Callable[..., list[Rank]]) -> None:
    first, last = start_ranks("leave", "leave")
    go(first)
    time.sleep(1.5 * SECONDS_BETWEEN_LOOKS)  # the last rank looks at the store again, which the first hosts
    go(last)
    for process in (first, last):
        assert end(process) == (0, "left\n", "")


def test_an_error_ends_ranks_that_no_collective_would_wake(start_ranks: Callable[..., list[Rank]]) -> None:
    reporter, spinning, failing = start_ranks("spin", "spin", "fail")
    for process in (reporter, spinning, failing):
        go(process)
    status, _, errors = end(failing)
    assert status == 1
    assert errors.startswith(f"sas-megatron: rank 2 on {HOST}:\nTraceback")
    assert end(spinning) == (1, "", "")
    status, _, errors = end(reporter)
    assert status == 1
    assert errors == (
        f"sas-megatron: training stopped after step 3: rank 2 on {HOST} (last finished step 3) failed: "
        "ValueError: no good; go on from the last checkpoint with checkpoint.resume=true\n"
    )


def test_an_error_met_alike_by_all_is_shown_once_and_at_once(
    start_ranks: Callable[..., list[Rank]],
) -> None:
    processes = start_ranks("fail", "fail")
    started = time.monotonic()
    for process in processes:
        go(process)
    first, second = map(end, processes)
    assert time.monotonic() - started < GRACE_SECONDS
    assert first[2].count("Traceback") == 1
    assert first[2].count("training stopped") == 1
    assert second == (1, "", "")


def test_what_the_user_can_mend_passes_as_it_is(start_ranks: Callable[..., list[Rank]]) -> None:
    for process in start_ranks("mend", "mend"):
        go(process)
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


def test_a_signal_that_is_taken_care_of_ends_nothing_while_all_are_there(
    start_ranks: Callable[..., list[Rank]],
) -> None:
    first, second = start_ranks("take", "spin")
    go(second)  # its main thread would answer nothing
    first.send_signal(signal.SIGUSR1)
    time.sleep(GRACE_SECONDS + 3)
    assert (first.poll(), second.poll()) == (None, None)
    first.send_signal(signal.SIGUSR1)
    status, _, errors = end(first)
    assert status == 1
    assert f"rank 0 on {HOST} (last finished step 1) received SIGUSR1; go on" in errors
    assert end(second) == (1, "", "")


def test_a_signal_is_no_order_to_stop_where_a_rank_is_gone(start_ranks: Callable[..., list[Rank]]) -> None:
    first, second = start_ranks("take", "take")
    second.kill()
    first.send_signal(signal.SIGTERM)  # as torchrun does then
    status, _, errors = end(first)
    assert status == 1
    assert f"rank 1 on {HOST} (last finished step 2) did not answer, being dead or hung" in errors


@pytest.mark.sampled(every=2)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "gone dark"])
def test_a_lost_store_keeps_nobody_from_ending(
    start_ranks: Callable[..., list[Rank]], number: signal.Signals
) -> None:
    host, first, second = start_ranks("leave", "leave", "fail")
    host.send_signal(number)
    time.sleep(2.5)  # the others have looked at the store since
    assert (first.poll(), second.poll()) == (None, None), "a lost store alone ends nothing"
    go(second)
    status, _, errors = end(second)
    assert status == 1
    assert "ValueError: no good" in errors
