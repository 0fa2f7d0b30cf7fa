"""The line that a stopped run leaves: every kind of end, worded whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from sas_megatron.fault_tolerance.final_report import (
    Answer,
    AnswerKind,
    Standing,
    describe_lost_store,
    describe_stop,
    join_ranges,
)

GO_ON = "; go on from the last checkpoint with checkpoint.resume=true"
WAITED = "the others waited 10 minutes in a collective (training.collective_timeout_minutes)"
TIMED_OUT = Answer(AnswerKind.LOST, "RuntimeError: [gloo/buffer.cc:81] Timed out waiting 600000ms for recv")
CLOSED = Answer(AnswerKind.LOST, "RuntimeError: [gloo/pair.cc:544] Connection closed by peer")
WAITS = Answer(AnswerKind.STANDS, "distributed/distributed_c10d.py:3000 in all_reduce")
LOOPS = Answer(AnswerKind.STANDS, "data/batches.py:57 in microbatches")
BROKEN = Answer(AnswerKind.FAILED, "OSError: [Errno 28] No space left on device")
TERMINATED = Answer(AnswerKind.TOLD, "received SIGTERM")

ENDS: dict[str, tuple[list[tuple[str | None, int | None, Answer | None]], str]] = {
    "a dead rank": (
        [("a", 18, CLOSED), ("a", 18, WAITS), ("b", 17, None), ("b", 18, TERMINATED)],
        "training stopped after step 18: rank 2 on b (last finished step 17) did not answer, "
        f"being dead or hung{GO_ON}",
    ),
    "a host that hangs": (
        [("a", 17, TIMED_OUT), ("a", 17, WAITS), ("b", 17, None), ("b", 17, None)],
        "training stopped after step 17: ranks 2-3 on b (last finished step 17) did not answer, "
        f"being dead or hung; {WAITED}{GO_ON}",
    ),
    "an error and a dead rank": (
        [("a", 17, None), ("a", 17, BROKEN), ("a", 17, WAITS)],
        "training stopped after step 17: rank 1 on a (last finished step 17) failed: OSError: [Errno 28] "
        "No space left on device; rank 0 on a (last finished step 17) did not answer, "
        f"being dead or hung{GO_ON}",
    ),
    "one error on many ranks": (
        [("a", 17, BROKEN), ("b", 17, BROKEN), ("a", 17, WAITS), ("a", 17, BROKEN)],
        "training stopped after step 17: ranks 0, 3 on a (last finished step 17), rank 1 on b (last finished "
        f"step 17) failed: OSError: [Errno 28] No space left on device{GO_ON}",
    ),
    "a rank that loops": (
        [("a", 17, TIMED_OUT), ("a", 17, TIMED_OUT), ("b", 17, LOOPS)],
        "training stopped after step 17: rank 2 on b (last finished step 17) stayed at data/batches.py:57 "
        f"in microbatches; {WAITED}{GO_ON}",
    ),
    "different collectives": (
        [("a", 17, TIMED_OUT), ("a", 17, TIMED_OUT)],
        "training stopped after step 17: no rank is missing, so they wait in different collectives or for a "
        f"slow network; {WAITED}{GO_ON}",
    ),
    "a signal from outside": (
        [("a", 17, TERMINATED), ("b", 17, WAITS)],
        f"training stopped after step 17: rank 0 on a (last finished step 17) received SIGTERM{GO_ON}",
    ),
    "a broken network": (
        [("a", 17, CLOSED), ("b", 17, WAITS)],
        "training stopped after step 17: rank 0 on a (last finished step 17) lost a connection: "
        f"RuntimeError: [gloo/pair.cc:544] Connection closed by peer{GO_ON}",
    ),
    "before any step": (
        [("a", None, WAITS), (None, None, None)],
        "training stopped while starting: rank 1 on an unknown host (no step) did not answer, "
        f"being dead or hung{GO_ON}",
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_ranks_at_fault_are_named_with_host_and_step(end: str) -> None:
    told, expected = ENDS[end]
    standings = [Standing(rank, *of_rank) for rank, of_rank in enumerate(told)]
    assert describe_stop(standings, timeout_minutes=10.0) == expected


def test_flight_records_are_named_where_ranks_waited_in_vain() -> None:
    folder = Path("runs/sas/flight_recorder")
    absent = Standing(1, host="a", last_step=2, answer=None)
    for answer, hangs in (
        (TIMED_OUT, True),
        (CLOSED, False),
        (Answer(AnswerKind.FAILED, "ValueError: no good"), False),
    ):
        standings = [Standing(0, host="a", last_step=2, answer=answer)]
        told = describe_stop(standings, timeout_minutes=10.0, flight_records=folder)
        assert (f"; each rank's last collectives are in {folder}; go on" in told) == hangs
        told = describe_stop([*standings, absent], timeout_minutes=10.0, flight_records=folder)
        assert str(folder) in told


def test_a_lost_store_points_at_its_host() -> None:
    assert describe_lost_store("node01", 17).startswith(
        "training stopped after step 17: the store of this run at node01 is gone"
    )
    assert describe_lost_store("node01", None).startswith("training stopped while starting:")


def test_neighbouring_ranks_are_joined() -> None:
    assert join_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
