"""If a rank dies, hangs or fails, the job ends within a time limit, names the rank, and leaves no process."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sas_megatron.fault_tolerance.failure_watchdog import GRACE_SECONDS
from tests.end_to_end.jobs import LAUNCHERS, Job
from tests.small_data import SmallData

TIMEOUT_SECONDS = 9  # long enough for four ranks to join on two busy cores
TIMEOUT = "0.15"  # the same in minutes, as reports print it
LAUNCHER_KILLS_AFTER_SECONDS = 30  # processes that ignore SIGTERM
MARGIN_SECONDS = 30  # for a busy machine
HOST = socket.gethostname()
FAULTY = "tests.end_to_end.faulty_training"


@pytest.fixture(params=LAUNCHERS)
def job(tmp_path: Path, small_data: SmallData, request: pytest.FixtureRequest) -> Iterator[Job]:
    config = small_data.run(
        tmp_path / "run",
        parallel={"tensor": 2},
        training={
            "num_steps": 5000,
            "micro_batch_size": 2,
            "collective_timeout_minutes": TIMEOUT_SECONDS / 60,
        },
        evaluation={"interval": None},
    )
    job = Job(tmp_path, config, launcher=request.param)
    yield job
    job.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_dies_or_stops_ends_the_job_and_is_named(job: Job, number: signal.Signals) -> None:
    seconds = GRACE_SECONDS + MARGIN_SECONDS
    if number == signal.SIGSTOP:
        seconds += TIMEOUT_SECONDS + LAUNCHER_KILLS_AFTER_SECONDS
    job.start_ranks(4, "train", str(job.config))
    job.wait_for_record(3)
    job.signal_rank(3, number)
    assert job.wait(seconds) == 1
    assert not job.processes()
    report = job.report()
    matched = re.fullmatch(
        rf"sas-megatron: training stopped after step (\d+): rank 3 on {HOST} \(last finished step (\d+)\) "
        r"reported no status \(dead or hung\); (the others waited .*; )?"
        r"each rank's last collectives are in \S+; resume from the last checkpoint .*",
        report,
    )
    assert matched, report
    newest, last = int(matched[1]), int(matched[2])
    assert last in (newest, newest - 1)
    assert newest in (job.num_records(), job.num_records() + 1)
    timeout_message = (
        f"the others waited {TIMEOUT} minutes in a collective (training.collective_timeout_minutes)"
    )
    assert (timeout_message in report) == (number == signal.SIGSTOP)
    folder = job.run_directory / "flight_recorder"
    assert f"each rank's last collectives are in {folder}" in report
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]
    assert len(records) == 3, "all ranks except rank 3"
    assert {record["entries"][-1]["profiling_name"].split(":")[0] for record in records} == {"gloo"}
    assert "Traceback" not in _without_torchrun(job.output())


def test_an_error_on_one_rank_is_shown_once_and_ends_the_job(job: Job) -> None:
    job.start_ranks(4, "raise_error", str(job.config), module=FAULTY)
    job.wait_for_record(3)
    assert job.wait(GRACE_SECONDS + MARGIN_SECONDS) == 1
    assert not job.processes()
    assert (
        f"training stopped after step 3: rank 3 on {HOST} (last finished step 3) failed: "
        "ValueError: this sample is no good; resume" in job.report()
    )
    output = _without_torchrun(job.output())
    assert output.count("Traceback") == 1
    assert "in raise_error\n" in output


def test_a_rank_that_loops_is_named_with_its_line_of_code(job: Job) -> None:
    job.start_ranks(4, "loop_for_ever", str(job.config), module=FAULTY)
    job.wait_for_record(3)
    assert job.wait(TIMEOUT_SECONDS + GRACE_SECONDS + MARGIN_SECONDS) == 1
    assert not job.processes()
    assert re.search(
        rf"after step 3: rank 3 on {HOST} \(last finished step 3\) was still at \S*faulty_training\.py:\d+ "
        rf"in loop_for_ever; the others waited {TIMEOUT} minutes",
        job.report(),
    )
    assert "Traceback" not in _without_torchrun(job.output())


def test_a_launcher_that_is_killed_leaves_no_process_behind(job: Job) -> None:
    job.start_ranks(4, "train", str(job.config))
    job.wait_for_record(3)
    job.signal_launcher(signal.SIGKILL)
    assert job.wait(1) == -signal.SIGKILL
    deadline = time.monotonic() + GRACE_SECONDS + MARGIN_SECONDS
    while job.processes():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.2)
    assert (
        "cannot be reached, so the other ranks' status is unknown; "
        "rank 0, its launcher or its host ended first" in job.report()
    )


def _without_torchrun(output: str) -> str:
    """Return the job's output without torchrun's report, which starts with torchrun's own traceback."""
    return re.split(r"Traceback \(most recent call last\):\n  File \"[^\"]*/torchrun\"", output)[0]
