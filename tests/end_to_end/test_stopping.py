"""After a signal or a time limit a job saves and stops, and the resumed job equals an undisturbed one."""

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
from sas_megatron.fault_tolerance.failure_watchdog import GRACE_SECONDS
from sas_megatron.fault_tolerance.stop_request import DUPLICATE_SIGNAL_SECONDS, STOPPED_STATUS
from tests.end_to_end.jobs import LAUNCHERS, MEGATRON_LINE, Job
from tests.small_data import SmallData
from tests.training.test_runs import assert_same_final_state, complete, records

MARGIN_SECONDS = 60  # for a busy machine
HOST = socket.gethostname()
STOPPED_AFTER = 4


def config_of(small_data: SmallData, directory: Path, **training: Any) -> RunConfig:
    return small_data.run(
        directory,
        model={"hidden_dropout": 0.1},
        training={"num_steps": 8, **training},
        evaluation={"interval": 2},
        checkpoint={"interval": 3},
    )


@pytest.fixture(params=LAUNCHERS)
def job(tmp_path: Path, small_data: SmallData, request: pytest.FixtureRequest) -> Iterator[Job]:
    job = Job(tmp_path, config_of(small_data, tmp_path / "run"), launcher=request.param)
    yield job
    job.kill()


@pytest.fixture(scope="module")
def undisturbed(ranks: Any, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Complete the same run on two ranks without a stop."""
    config = config_of(small_data, tmp_path_factory.mktemp("undisturbed") / "run")
    ranks(2).run(complete, config)
    return config


def start_disturbed(job: Job, when: str, target: str, number: signal.Signals) -> None:
    arguments = (when, target, number.name, str(job.config))
    job.start_ranks(2, *arguments, module="tests.end_to_end.disturbed_training")


def read(job: Job, name: str) -> dict[str, Any]:
    return json.loads((job.run_directory / name).read_text())


def check_stop(job: Job, reason: str) -> int:
    """Check the files and the output of a job that was stopped; return its last step."""
    assert not job.processes()
    stopped, summary = read(job, "stopped.json"), read(job, "summary.json")
    assert stopped == {"exit_reason": reason, "exit_status": STOPPED_STATUS, "step": summary["steps"]}
    assert summary["exit_reason"] == reason
    assert (job.run_directory / "checkpoints" / f"iter_{summary['steps']:07d}").is_dir()
    assert f"stopping after step {summary['steps']}: {reason}" in job.output()
    assert "training stopped" not in job.output(), "a requested stop is not a failure"
    return int(summary["steps"])


def check_resume(job: Job, small_data: SmallData, undisturbed: RunConfig) -> None:
    """Resume the job and check that it ends bit-identically to the undisturbed run."""
    job.start_ranks(2, "train", str(job.config), "checkpoint.resume=true")
    assert job.wait(240) == 0, job.output()
    assert f"resuming from {job.run_directory}/checkpoints/iter_{STOPPED_AFTER:07d}" in job.output()
    assert not (job.run_directory / "stopped.json").exists()
    assert read(job, "summary.json")["exit_reason"] == "finished"
    resumed = config_of(small_data, job.run_directory)
    assert_same_final_state(resumed, undisturbed)
    for kind, keys in (
        ("train", ("step", "train_loss", "gradient_norm")),
        ("validation", ("step", "validation_loss")),
    ):
        expected = [[record[key] for key in keys] for record in records(undisturbed, kind)]
        assert [[record[key] for key in keys] for record in records(resumed, kind)] == expected


@pytest.mark.parametrize(
    ("when", "target", "number"),
    [
        ("step", "rank", signal.SIGUSR1),
        ("save", "rank", signal.SIGTERM),
        ("step", "launcher", signal.SIGINT),
        pytest.param("save", "rank", signal.SIGUSR1, marks=pytest.mark.exhaustive),
        pytest.param("step", "rank", signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param("step", "launcher", signal.SIGUSR1, marks=pytest.mark.exhaustive),
        pytest.param("step", "launcher", signal.SIGTERM, marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_stops_all_ranks_after_the_step_and_the_resumed_run_is_bit_identical(
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
    if target == "rank":  # a launcher that receives the signal does not list statuses
        assert re.search(rf"exitcode\s*: {STOPPED_STATUS}", job.output())
    check_resume(job, small_data, undisturbed)


def test_a_second_signal_ends_all_ranks_at_once(job: Job) -> None:
    start_disturbed(job, "forever", "rank", signal.SIGUSR1)
    job.wait_for_record(4)  # three steps and an evaluation
    job.signal_rank(0, signal.SIGTERM)
    job.wait_for_output("received SIGTERM: saving after this step", MARGIN_SECONDS)
    time.sleep(1.1 * DUPLICATE_SIGNAL_SECONDS)
    job.signal_rank(0, signal.SIGTERM)
    assert job.wait(GRACE_SECONDS + MARGIN_SECONDS) == 1
    assert not job.processes()
    assert re.search(rf"after step 3: rank 0 on {HOST} .* received SIGTERM; resume", job.report())
    assert not (job.run_directory / "stopped.json").exists()


def test_the_torchrun_script_trains_writes_logs_and_forwards_signals(
    tmp_path: Path, small_data: SmallData, ranks: Any
) -> None:
    """The only training run with launch/torchrun.sh in the default tests."""

    def config(name: str, **training: Any) -> RunConfig:
        return small_data.run(
            tmp_path / name,
            parallel={"tensor": 2},
            training={"num_steps": 5000, **training},
            evaluation={"interval": None},
            logging={"interval": 2},
        )

    job, logs = Job(tmp_path, config("run")), tmp_path / "logs"
    try:
        job.start("launch/torchrun.sh", "2", str(job.config), LOG_DIR=str(logs))
        job.wait_for_record(4)
        job.signal_launcher(signal.SIGUSR1)
        assert job.wait(MARGIN_SECONDS) != 0
        assert check_stop(job, "signal SIGUSR1") >= 6
    finally:
        job.kill()
    assert read(job, "summary.json")["world_size"] == 2
    lines = [line for line in job.output().splitlines() if "lm loss:" in line]
    assert all(MEGATRON_LINE.match(line) for line in lines), "Megatron's form, without a launcher's prefix"
    steps = [int(re.findall(r"iteration +(\d+)/", line)[0]) for line in lines]
    assert steps[:4] == [1, 2, 4, 6], "step 1 and every second step, from one rank"
    for text in (
        "consumed samples:",
        "elapsed time per iteration (ms):",
        "throughput per GPU (TFLOP/s/GPU, model FLOPs, full attention matrix):",
        "peak memory of rank 0 (GiB):",
    ):
        assert text in lines[0]
    printed = {path.parts[-2]: path.read_text() for path in logs.rglob("stdout.log")}
    assert sorted(printed) == ["0", "1"]
    assert printed["0"].count("lm loss:") == len(lines)
    assert "lm loss:" not in printed["1"]

    undisturbed = config("undisturbed", stop_after_steps=6)
    ranks(2).run(complete, undisturbed)
    expected = [record["train_loss"] for record in records(undisturbed)]
    assert [record["train_loss"] for record in records(config("run"))][: len(expected)] == expected


def test_the_time_limit_stops_a_single_process_with_the_status_of_a_stop(
    tmp_path: Path, small_data: SmallData
) -> None:
    job = Job(tmp_path, config_of(small_data, tmp_path / "run", num_steps=5000, stop_after_seconds=3))
    try:
        job.start_forked("train", job.config)
        assert job.wait(3 + MARGIN_SECONDS) == STOPPED_STATUS
        assert check_stop(job, "stop_after_seconds") >= 1
    finally:
        job.kill()
