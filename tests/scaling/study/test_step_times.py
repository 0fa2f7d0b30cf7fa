"""Step times of several studies, measured in alternation on a machine without other load."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.platform import local_machine
from sas_megatron.platform.local_machine import OtherLoad
from sas_megatron.scaling.study import step_times
from sas_megatron.scaling.study.step_times import describe_step_times, measure_step_times, read_step_times
from tests.scaling.study.studies import plan_of, write_study


def test_equal_cells_of_several_studies_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times.OtherLoad, "measure", lambda _: 0.7)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    small = {"small": {"model.hidden_size": 24, "attention.num_heads": 4}}
    plans = [plan_of(folders[0]), plan_of(folders[1], sizes=small, budgets={"tokens": [9_000]})]
    measured: list[RunConfig] = []

    def timer(configs: list[RunConfig], rounds: int) -> list[list[float]]:
        measured.extend(configs)
        return [[1.0 + number + 10 * turn for number in range(len(configs))] for turn in range(rounds)]

    paths = measure_step_times(plans, timer, rounds=2, machine={"processor": "x"})
    assert paths == [folder / "study" / "step_seconds.json" for folder in folders]
    assert len(measured) == 4
    first, second = map(read_step_times, plans)
    assert first["mha-small"] == [1.0, 11.0]
    assert second == {name: first[name] for name in ("mha-small", "sas-small")}
    remark = "Other processes used 0.7 processors while the step times were measured."
    assert remark in describe_step_times(plans[0])


def test_a_busy_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_machine.OtherLoad, "measure", lambda _: 1.25)
    done = CliRunner().invoke(cli, ["study", "time", str(write_study(tmp_path))])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("other processes use 1.2 of ")
    assert str(done.exception).endswith("stop them, or measure anyway with --on-busy-machine")
    for load in (None, 0.1):
        step_times.check_quiet(load)


def test_other_load_excludes_this_process_and_the_processes_that_it_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    busy, own, now = iter([100.0, 105.0]), iter([10.0, 12.0]), iter([0.0, 2.0])
    monkeypatch.setattr(local_machine, "_read_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(local_machine, "_read_own_seconds", lambda: next(own))
    monkeypatch.setattr(local_machine.time, "monotonic", lambda: next(now))
    # 5 s of all processes without 2 s of this one, in 2 s.
    assert OtherLoad().measure() == 1.5


def test_processor_seconds_of_the_system_include_those_of_this_process() -> None:
    def read() -> tuple[float, float]:
        return local_machine._read_busy_seconds() or 0.0, local_machine._read_own_seconds()

    before = read()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    after = read()
    # The system counts ticks of 10 ms.
    assert after[0] - before[0] >= after[1] - before[1] - 0.03
    assert after[1] - before[1] >= 0.09


def test_without_proc_the_other_load_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_machine, "_read_busy_seconds", lambda: None)
    assert OtherLoad().measure() is None
