"""The full text of the final report, for every way in which a run can stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from sas_megatron.fault_tolerance.final_report import (
    COMMAND,
    RankStatus,
    StatusKind,
    StatusReport,
    describe_lost_store,
    describe_stop,
    join_ranges,
)

RESUME = "; resume from the last checkpoint with checkpoint.resume=true"
WAITED = "the others waited 10 minutes in a collective (training.collective_timeout_minutes)"
TIMED_OUT = StatusReport(
    StatusKind.CONNECTION_LOST, "RuntimeError: [gloo/buffer.cc:81] Timed out waiting 600000ms for recv"
)
CLOSED = StatusReport(
    StatusKind.CONNECTION_LOST, "RuntimeError: [gloo/pair.cc:544] Connection closed by peer"
)
WAITING = StatusReport(StatusKind.RUNNING, "distributed/distributed_c10d.py:3000 in all_reduce")
LOOPING = StatusReport(StatusKind.RUNNING, "data/batches.py:57 in microbatches")
BROKEN = StatusReport(StatusKind.FAILED, "OSError: [Errno 28] No space left on device")
TERMINATED = StatusReport(StatusKind.TERMINATED, "received SIGTERM")

ENDS: dict[str, tuple[list[tuple[str | None, int | None, StatusReport | None]], str]] = {
    "a dead rank": (
        [("a", 18, CLOSED), ("a", 18, WAITING), ("b", 17, None), ("b", 18, TERMINATED)],
        "training stopped after step 18: rank 2 on b (last finished step 17) reported no status "
        f"(dead or hung){RESUME}",
    ),
    "a host that hangs": (
        [("a", 17, TIMED_OUT), ("a", 17, WAITING), ("b", 17, None), ("b", 17, None)],
        "training stopped after step 17: ranks 2-3 on b (last finished step 17) reported no status "
        f"(dead or hung); {WAITED}{RESUME}",
    ),
    "an error and a dead rank": (
        [("a", 17, None), ("a", 17, BROKEN), ("a", 17, WAITING)],
        "training stopped after step 17: rank 1 on a (last finished step 17) failed: OSError: [Errno 28] "
        "No space left on device; rank 0 on a (last finished step 17) reported no status "
        f"(dead or hung){RESUME}",
    ),
    "one error on many ranks": (
        [("a", 17, BROKEN), ("b", 17, BROKEN), ("a", 17, WAITING), ("a", 17, BROKEN)],
        "training stopped after step 17: ranks 0, 3 on a (last finished step 17), rank 1 on b (last finished "
        f"step 17) failed: OSError: [Errno 28] No space left on device{RESUME}",
    ),
    "a rank that loops": (
        [("a", 17, TIMED_OUT), ("a", 17, TIMED_OUT), ("b", 17, LOOPING)],
        "training stopped after step 17: rank 2 on b (last finished step 17) was still at data/batches.py:57 "
        f"in microbatches; {WAITED}{RESUME}",
    ),
    "different collectives": (
        [("a", 17, TIMED_OUT), ("a", 17, TIMED_OUT)],
        "training stopped after step 17: every rank waits in a collective: either in "
        f"different ones, or for a slow network; {WAITED}{RESUME}",
    ),
    "a signal from outside": (
        [("a", 17, TERMINATED), ("b", 17, WAITING)],
        f"training stopped after step 17: rank 0 on a (last finished step 17) received SIGTERM{RESUME}",
    ),
    "a broken network": (
        [("a", 17, CLOSED), ("b", 17, WAITING)],
        "training stopped after step 17: rank 0 on a (last finished step 17) lost a connection: "
        f"RuntimeError: [gloo/pair.cc:544] Connection closed by peer{RESUME}",
    ),
    "before any step": (
        [("a", None, WAITING), (None, None, None)],
        "training stopped during startup: rank 1 on an unknown host (no finished step) reported no status "
        f"(dead or hung){RESUME}",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_failed_ranks_are_named_with_host_and_last_step(end: str) -> None:
    reported, expected = ENDS[end]
    statuses = [RankStatus(rank, *status) for rank, status in enumerate(reported)]
    assert describe_stop(statuses, timeout_minutes=10.0) == expected


def test_flight_records_are_named_if_a_collective_timed_out_or_a_rank_is_silent() -> None:
    folder = Path("runs/sas/flight_recorder")
    silent = RankStatus(1, host="a", last_step=2, report=None)
    for report, hangs in (
        (TIMED_OUT, True),
        (CLOSED, False),
        (StatusReport(StatusKind.FAILED, "ValueError: no good"), False),
    ):
        statuses = [RankStatus(0, host="a", last_step=2, report=report)]
        text = describe_stop(statuses, timeout_minutes=10.0, flight_records=folder)
        assert (f"; each rank's last collectives are in {folder}; resume" in text) == hangs
        text = describe_stop([*statuses, silent], timeout_minutes=10.0, flight_records=folder)
        assert str(folder) in text


def test_the_report_of_a_lost_store_names_its_host() -> None:
    assert describe_lost_store("node01", 17).startswith(
        "training stopped after step 17: the store of this run at node01 cannot be reached"
    )
    assert describe_lost_store("node01", None).startswith("training stopped during startup:")


def test_consecutive_ranks_are_joined_to_ranges() -> None:
    assert join_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_the_remedy_of_a_command_that_does_not_train_is_to_run_it_again() -> None:
    statuses = [RankStatus(0, "a", None, TERMINATED), RankStatus(1, "a", None, TERMINATED)]
    assert describe_stop(statuses, timeout_minutes=10.0, activity=COMMAND) == (
        "the command stopped: ranks 0-1 on a (no finished step) received SIGTERM; run it again"
    )
    assert describe_lost_store("node01", None, COMMAND).startswith(
        "the command stopped: the store of this run"
    )
