"""What a run's files tell of it."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.cli.study_tables import print_status
from sas_megatron.config.errors import FieldError
from sas_megatron.config.loading import dump_yaml
from sas_megatron.scaling.study.collecting import collect
from sas_megatron.scaling.study.plan import Plan
from sas_megatron.scaling.study.run_states import RunStatus, last_error, log_of
from sas_megatron.scaling.study.runner import StudyRunner, _Started
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.scaling.study.studies import leave_run, write_study

LAUNCHER = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\nexitcode  : 1\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "lm loss: 4\nsas-megatron: training stopped after step 5: rank 1 on b failed\n" + LAUNCHER,
            "sas-megatron: training stopped after step 5: rank 1 on b failed",
        ),
        ("sas-megatron: error: a.b=3: must be 4; use 4\n\n", "sas-megatron: error: a.b=3: must be 4; use 4"),
        (
            "[rank0]:   File x\n[rank0]: sas_megatron.training.health.TrainingFault: step 5: nan\n"
            + LAUNCHER,
            "[rank0]: sas_megatron.training.health.TrainingFault: step 5: nan",
        ),
        ("Traceback\n  File x\nValueError: no\nsome more\n", "ValueError: no"),
        ("slurmstepd: killed by the kernel\n", "slurmstepd: killed by the kernel"),
        ("\n \n", "nothing was printed"),
    ],
)
def test_the_reason_is_the_runs_own_word_before_its_launchers(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "log").write_text("RuntimeError: of the time before\n" + text)
    assert last_error(tmp_path / "log", offset=len("RuntimeError: of the time before\n")) == reason


def plan_at(folder: Path) -> Plan:
    return plan_with_rates(*load_study(write_study(folder, seeds=2)))


def test_what_was_to_branch_off_a_trunk_that_diverged_has_diverged(tmp_path: Path) -> None:
    plan = plan_at(tmp_path)
    trunk, short, *_ = plan.runs
    other = next(run for run in plan.results if run.trunk != trunk.name)
    leave_run(trunk, exit_reason=None)
    leave_run(other)
    # What it had saved before is there to branch off.
    Path(short.config.checkpoint.branch_from or "").mkdir(parents=True)
    table = collect(plan)
    states = {row.run: row.status for row in table.rows}
    assert states[short.name] == "missing"
    assert [name for name, state in states.items() if state == "diverged"] == ["mha-small-2.5-s1234"]
    assert states[other.name] == "done"


def test_an_edited_study_starts_nothing_beside_what_it_would_spoil(tmp_path: Path) -> None:
    plan = plan_at(tmp_path)
    second = [run for run in plan.runs if run.role == "trunk"][1]
    second.directory.mkdir(parents=True)
    other = second.config.replaced({"optimizer.weight_decay": 0.3})
    (second.directory / "config.yaml").write_text(dump_yaml(other))
    runner = StudyRunner(lambda: plan, jobs=2, say=lambda text: None)
    with pytest.raises(FieldError, match=r"optimizer\.weight_decay=0\.3"):
        runner.run(wanted=lambda run: True)
    assert not log_of(plan.runs[0]).exists()


def test_a_run_without_a_loss_is_told_as_done(tmp_path: Path) -> None:
    plan = plan_at(tmp_path)
    run = plan.runs[0]
    leave_run(run, loss=None)
    said: list[str] = []
    with subprocess.Popen(["true"]) as process:
        process.wait()
    StudyRunner(lambda: plan, jobs=1, say=said.append)._tell_end(
        _Started(run, process, 0, contextlib.ExitStack())
    )
    assert said == [f"{run.name}: done, validation loss –, 0 s"]


def test_stopped_runs_are_no_seed_noise(tmp_path: Path) -> None:
    plan = plan_at(tmp_path)
    one, other, third = [run for run in plan.results if run.name.startswith("mha-small-1-")] + [
        run for run in plan.results if run.name == "sas-small-1-s1234"
    ]
    leave_run(one, loss=4.0)
    leave_run(other, loss=6.0, exit_reason="sigterm")
    leave_run(third)
    path = str(tmp_path / "study.yaml")
    shown = CliRunner().invoke(cli, ["study", "plan", path, "--json"])
    assert json.loads(shown.output)["seed_noise"] is None


def test_the_status_shows_reasons_as_they_are_and_joins_what_waits_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    failed, *others = plan_at(tmp_path).runs[:5]
    reason = "[rank0]: RuntimeError: no such file [/red]"
    waiting = [RunStatus(run, "waiting", 0, "its learning rate is decided by the sweep") for run in others]
    print_status([RunStatus(failed, "failed", 3, reason), *waiting])
    shown = capsys.readouterr().out
    assert reason in shown
    assert f"{others[0].name} and 3 more" in shown
    assert others[1].name not in shown
    assert "5 runs: 4 waiting, 1 failed" in shown
