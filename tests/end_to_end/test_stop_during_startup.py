"""A signal that arrives before the first step is not lost: the run saves and stops after that step."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sas_megatron.fault_tolerance.stop_request import STOPPED_STATUS, StopRequest
from sas_megatron.scaling.study import runner
from sas_megatron.scaling.study.run_states import failure_path
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.end_to_end.jobs import FORKED, Job
from tests.scaling.study.running_studies import base_tree
from tests.scaling.study.studies import write_study
from tests.selection import cases
from tests.small_data import SmallData
from tests.training.test_runs import complete

DISTURBED = "tests.end_to_end.disturbed_training"


@pytest.mark.parametrize(
    ("when", "num_ranks", "number"),
    cases(
        [
            # While rank 0 has removed stopped.json, and has not yet opened all files of the run.
            ("open", 2, signal.SIGTERM),
            ("open", 1, signal.SIGUSR1),
            # While a rank builds its model.
            ("build", 2, signal.SIGHUP),
            ("build", 1, signal.SIGINT),
        ],
        default=[("open", 2, signal.SIGTERM), ("build", 1, signal.SIGINT)],
    ),
)
@pytest.mark.parametrize("is_resumed", cases([False, True], default=[True]))
def test_a_signal_during_startup_stops_the_run_after_its_first_step(
    ranks: Any,
    small_data: SmallData,
    tmp_path: Path,
    when: str,
    num_ranks: int,
    number: signal.Signals,
    is_resumed: bool,
) -> None:
    def config(**training: Any) -> Any:
        return small_data.run(
            tmp_path / "run",
            training={"num_steps": 5000, **training},
            evaluation={"interval": None},
            checkpoint={"resume": True},
        )

    job = Job(tmp_path, config(), launcher=FORKED)
    stopped = job.run_directory / "stopped.json"
    if is_resumed:
        ranks(num_ranks).run(complete, config(stop_after_steps=2))
        stopped.write_text("{}")
    arguments = (when, "rank", number.name, str(job.config))
    try:
        if num_ranks == 1:
            job.start_forked(*arguments, module=DISTURBED)
            assert job.wait(240) == STOPPED_STATUS, job.output()
        else:
            job.start_ranks(num_ranks, *arguments, module=DISTURBED)
            assert job.wait(240) == 1, job.output()
            assert f"exitcode : {STOPPED_STATUS}" in job.output()
    finally:
        job.kill()
    last_step = 3 if is_resumed else 1
    assert json.loads(stopped.read_text()) == {
        "exit_reason": f"signal {number.name}",
        "exit_status": STOPPED_STATUS,
        "step": last_step,
    }
    assert (job.run_directory / "checkpoints" / f"iter_{last_step:07d}").is_dir()
    if when == "open" or num_ranks == 1:  # only rank 0 acknowledges
        assert f"received {number.name}: saving after " in job.output()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_ranks_have_met_has_its_previous_effect(number: signal.Signals) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda received_number, _frame: received.append(received_number))
    try:
        with StopRequest(after_seconds=None, world_size=2) as request:
            signal.raise_signal(number)
            assert (received, request.reason) == ([number], None)
        with StopRequest(after_seconds=None, world_size=1) as request:
            signal.raise_signal(number)
            assert (received, request.reason) == ([number], f"signal {number.name}")
    finally:
        signal.signal(number, before)


class TrainingInStartup:
    """A process that is ended by its first signal, as one that still imports its modules."""

    def __init__(self, *_command: object, **_settings: object) -> None:
        self.returncode: int | None = None
        self._num_polls = 0
        signal.raise_signal(signal.SIGTERM)  # to the study, which does not know this process yet

    def poll(self) -> int | None:
        self._num_polls += 1
        assert self._num_polls < 10, "the study waits for a run that it has not asked to stop"
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        self.returncode = -number


def test_a_signal_while_a_study_starts_a_run_stops_that_run(
    small_data: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = {"sizes": {"one": {}}, "variants": {"mha": {}}, "budgets": {"tokens": [3_200]}}
    path = write_study(tmp_path, base_tree(small_data, tmp_path / "none"), **study)
    plan = plan_with_rates(*load_study(path))
    processes = SimpleNamespace(Popen=TrainingInStartup, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(runner, "subprocess", processes)
    lines: list[str] = []
    started = runner.StudyRunner(lambda: plan, jobs=2, log=lines.append)
    assert not started.run(selected=lambda _run: True)
    (run,) = plan.runs
    assert lines[-1] == f"{run.name}: stopped with status -15 before it saved a checkpoint"
    assert not failure_path(run).exists(), "a requested stop is not a failure"
