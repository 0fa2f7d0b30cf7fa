"""States of runs, derived from their files."""

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
from sas_megatron.scaling.study.run_states import RunStatus, final_loss, last_error, log_path, read_status
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
        ("\n \n", "no output"),
    ],
)
def test_reason_is_the_message_of_the_run_rather_than_that_of_its_launcher(
    tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "log").write_text("RuntimeError: earlier attempt\n" + text)
    assert last_error(tmp_path / "log", offset=len("RuntimeError: earlier attempt\n")) == reason


def plan_at(folder: Path) -> Plan:
    return plan_with_rates(*load_study(write_study(folder, seeds=2)))


def test_branch_of_a_diverged_trunk_has_diverged(tmp_path: Path) -> None:
    plan = plan_at(tmp_path)
    trunk, short, *_ = plan.runs
    other = next(run for run in plan.results if run.trunk != trunk.name)
    leave_run(trunk, exit_reason=None)
    leave_run(other)
    # The checkpoint that it saved before is available to the short branch.
    Path(short.config.checkpoint.branch_from or "").mkdir(parents=True)
    table = collect(plan)
    states = {row.run: row.status for row in table.rows}
    assert states[short.name] == "missing"
    assert [name for name, state in states.items() if state == "diverged"] == ["mha-small-2.5-s1234"]
    assert states[other.name] == "done"


def test_edited_study_starts_no_run_if_one_would_be_overwritten(tmp_path: Path) -> None:
    plan = plan_at(tmp_path)
    second = [run for run in plan.runs if run.role == "trunk"][1]
    second.directory.mkdir(parents=True)
    other = second.config.replaced({"optimizer.weight_decay": 0.3})
    (second.directory / "config.yaml").write_text(dump_yaml(other))
    runner = StudyRunner(lambda: plan, jobs=2, log=lambda text: None)
    with pytest.raises(FieldError, match=r"optimizer\.weight_decay=0\.3"):
        runner.run(selected=lambda run: True)
    assert not log_path(plan.runs[0]).exists()


def test_run_without_a_loss_is_reported_as_done(tmp_path: Path) -> None:
    plan = plan_at(tmp_path)
    run = plan.runs[0]
    leave_run(run, loss=None)
    messages: list[str] = []
    with subprocess.Popen(["true"]) as process:
        process.wait()
    StudyRunner(lambda: plan, jobs=1, log=messages.append)._report_end(
        _Started(run, process, 0, contextlib.ExitStack())
    )
    assert messages == [f"{run.name}: done, validation loss –, 0 s"]


def test_the_state_of_a_run_with_damaged_files_is_shown(tmp_path: Path) -> None:
    run = plan_at(tmp_path).runs[0]
    leave_run(run)
    metrics, summary = run.directory / "metrics.jsonl", run.directory / "summary.json"
    metrics.write_bytes(metrics.read_bytes() + b'7\n[{}]\n{"step": 9}\n{"kind": "train", "st\xff')
    for content in (b"[", b"\xff", b"[" * 9999, b'{"exit_reason": 7}'):
        summary.write_bytes(content)
        status = read_status(run)
        assert (status.state, status.step) == ("interrupted", 5)
        assert final_loss(run) is None
    summary.unlink()
    summary.mkdir()
    assert read_status(run).state == "interrupted"


def test_stopped_runs_do_not_count_as_seed_noise(tmp_path: Path) -> None:
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


def test_status_shows_reasons_verbatim_and_merges_equal_waiting_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    failed, *others = plan_at(tmp_path).runs[:5]
    reason = "[rank0]: RuntimeError: no such file [/red]"
    waiting = [RunStatus(run, "waiting", 0, "the sweep that determines its learning rate") for run in others]
    print_status([RunStatus(failed, "failed", 3, reason), *waiting])
    shown = capsys.readouterr().out
    assert reason in shown
    assert f"{others[0].name} and 3 more" in shown
    assert others[1].name not in shown
    assert "5 runs: 4 waiting, 1 failed" in shown


def test_status_table_fits_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    failed, other, *_ = plan_at(tmp_path).runs
    reason = "[rank0]: RuntimeError: the size of tensor a (16384) must match the size of tensor b (8192)"
    print_status([RunStatus(failed, "failed", 123_456, reason), RunStatus(other, "stuck", 7, "no output")])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert failed.name in shown
    assert "8192" in shown
