"""A signal or a time limit saves and stops a real job in good order, and it goes on as if undisturbed."""

from __future__ import annotations

import json
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from sas_megatron.parallel.roll_call import GRACE_SECONDS
from sas_megatron.training.stopping import SAME_ORDER_SECONDS, STOPPED_STATUS
from tests.end_to_end.jobs import Job
from tests.small_data import SmallData
from tests.training.test_runs import assert_end_alike, complete, records

MARGIN_SECONDS = 60  # for a busy machine
HOST = socket.gethostname()
STOPPED_AFTER = 4

# Trains as `sas-megatron train` does, but that rank 1 sends a signal, to itself or to the launcher: in
# step 4, in the save before it, or in step 4 which then never ends.
ENTRY = """
import itertools, os, signal, sys, time
from sas_megatron.config.loading import load_run_config
from sas_megatron.platform.device import prepare_device

def send():
    os.kill(os.getppid() if target == "launcher" else os.getpid(), signal.Signals[name])

if __name__ == "__main__":
    prepare_device()
    from sas_megatron.training import loop, start
    when, target, name = sys.argv[1:4]
    train_step, asdict, steps = loop.train_step, loop.asdict, itertools.count(1)

    def disturbed_step(*args, asks_to_stop, **kwargs):
        if next(steps) == 4 and os.environ["RANK"] == "1" and when != "save":
            send()
            deadline = time.monotonic() + 60
            while when == "forever" or not asks_to_stop() and time.monotonic() < deadline:
                time.sleep(0.01)
        return train_step(*args, asks_to_stop=asks_to_stop, **kwargs)

    def disturbed_save(progress):
        if progress.step == 3 and os.environ["RANK"] == "1" and when == "save":
            send()
        return asdict(progress)

    loop.train_step, loop.asdict = disturbed_step, disturbed_save
    sys.exit(start.train(load_run_config(sys.argv[4], sys.argv[5:])).exit_status)
"""


def config_of(small_data: SmallData, directory: Path, **training: Any) -> RunConfig:
    return small_data.run(
        directory,
        model={"hidden_dropout": 0.1},
        training={"num_steps": 8, **training},
        evaluation={"interval": 2},
        checkpoint={"interval": 3},
    )


@pytest.fixture
def job(tmp_path: Path, small_data: SmallData) -> Iterator[Job]:
    job = Job(tmp_path, config_of(small_data, tmp_path / "run"))
    yield job
    job.kill()


@pytest.fixture
def long_job(tmp_path: Path, small_data: SmallData) -> Iterator[Job]:
    job = Job(tmp_path, config_of(small_data, tmp_path / "run", num_steps=5000))
    yield job
    job.kill()


@pytest.fixture(scope="module")
def undisturbed(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The same run of two ranks without a stop."""
    config = config_of(small_data, tmp_path_factory.mktemp("undisturbed") / "run")
    ranks(2).run(complete, config)
    return config


def start_disturbed(job: Job, when: str, target: str, number: signal.Signals) -> None:
    entry = job.config.with_name("entry.py")
    entry.write_text(ENTRY)
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"
    launcher = ("torchrun", "--standalone", handled, "--nproc-per-node=2")
    job.start(*launcher, str(entry), when, target, number.name, str(job.config))


def read(job: Job, name: str) -> dict[str, Any]:
    return json.loads((job.run_directory / name).read_text())


def check_stop(job: Job, reason: str) -> int:
    """What a job leaves that was stopped in good order; gives the step after which."""
    assert not job.processes()
    stopped, summary = read(job, "stopped.json"), read(job, "summary.json")
    assert stopped == {"exit_reason": reason, "exit_status": STOPPED_STATUS, "step": summary["steps"]}
    assert summary["exit_reason"] == reason
    assert (job.run_directory / "checkpoints" / f"iter_{summary['steps']:07d}").is_dir()
    assert f"stopping after step {summary['steps']}: {reason}" in job.output()
    assert "training stopped" not in job.output(), "an orderly stop is no fault"
    return int(summary["steps"])


def check_goes_on(job: Job, small_data: SmallData, whole: RunConfig) -> None:
    """The job, gone on with, ends as the undisturbed run did, bit for bit."""
    job.start_by_script(2, "checkpoint.resume=true")
    assert job.wait(240) == 0, job.output()
    assert f"going on from {job.run_directory}/checkpoints/iter_{STOPPED_AFTER:07d}" in job.output()
    assert not (job.run_directory / "stopped.json").exists()
    assert read(job, "summary.json")["exit_reason"] == "finished"
    rest = config_of(small_data, job.run_directory)
    assert_end_alike(rest, whole)
    for kind, keys in (
        ("train", ("step", "train_loss", "gradient_norm")),
        ("validation", ("step", "validation_loss")),
    ):
        expected = [[record[key] for key in keys] for record in records(whole, kind)]
        assert [[record[key] for key in keys] for record in records(rest, kind)] == expected


@pytest.mark.parametrize(
    ("when", "target", "number"),
    [
        ("step", "rank", signal.SIGUSR1),
        pytest.param("save", "rank", signal.SIGUSR1, marks=pytest.mark.exhaustive),
        pytest.param("step", "rank", signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param("step", "launcher", signal.SIGUSR1, marks=pytest.mark.exhaustive),
        pytest.param("step", "launcher", signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param("step", "launcher", signal.SIGINT, marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_stops_all_ranks_after_the_step_and_nothing_is_lost(
    job: Job,
    small_data: SmallData,
    undisturbed: RunConfig,
    when: str,
    target: str,
    number: signal.Signals,
) -> None:
    start_disturbed(job, when, target, number)
    assert job.wait(240) != 0
    assert check_stop(job, f"signal {number.name}") == STOPPED_AFTER, job.output()
    if target == "rank":  # torchrun tells of its processes only where nobody told it to end
        assert re.search(rf"exitcode\s*: {STOPPED_STATUS}", job.output())
    check_goes_on(job, small_data, undisturbed)


def test_a_second_signal_ends_all_ranks_at_once(job: Job) -> None:
    start_disturbed(job, "forever", "rank", signal.SIGUSR1)
    job.wait_for_record(4)  # records: three steps and an evaluation
    job.signal_rank(0, signal.SIGTERM)
    job.wait_for_output("received SIGTERM: saving after this step", MARGIN_SECONDS)
    time.sleep(1.1 * SAME_ORDER_SECONDS)
    job.signal_rank(0, signal.SIGTERM)
    assert job.wait(GRACE_SECONDS + MARGIN_SECONDS) == 1
    assert not job.processes()
    assert re.search(rf"after step 3: rank 0 on {HOST} .* received SIGTERM; go on", job.report())
    assert not (job.run_directory / "stopped.json").exists()


def test_the_launch_script_hands_the_signal_on(long_job: Job) -> None:
    long_job.start_by_script(2)
    long_job.wait_for_record(4)
    long_job.signal_launcher(signal.SIGUSR1)
    assert long_job.wait(MARGIN_SECONDS) != 0
    assert check_stop(long_job, "signal SIGUSR1") >= 3


def test_the_time_limit_stops_a_bare_process_with_the_status(long_job: Job) -> None:
    long_job.start_bare("training.stop_after_seconds=20")
    assert long_job.wait(20 + MARGIN_SECONDS) == STOPPED_STATUS
    assert check_stop(long_job, "stop_after_seconds") >= 1
