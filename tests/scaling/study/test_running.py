"""Studies on real text that are run, stopped, killed, resumed and collected."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import UserError
from sas_megatron.planning import rank_processes
from sas_megatron.scaling.runs import has_finished
from sas_megatron.scaling.study import runner
from sas_megatron.scaling.study.collecting import collect
from sas_megatron.scaling.study.plan import Plan
from sas_megatron.scaling.study.record_exchange import collect_records, export_records
from sas_megatron.scaling.study.run_records import MAX_RECORD_BYTES
from sas_megatron.scaling.study.run_states import acquire_lock, is_locked, log_path, read_status
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.study_table import read_table
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.conftest import ROOT
from tests.fork_server import fork_context
from tests.scaling.study.running_studies import base_tree, complete, study_run, wait_until
from tests.scaling.study.studies import write_study
from tests.selection import exhaustive
from tests.small_data import SmallData

SIZES = {"one": {"model.num_layers": 1}}
STUDY = {
    "sizes": SIZES,
    "variants": {"mha": {"head_dim": 12}, "sas": {"head_expansion": 2}},
    "budgets": {"tokens": [3_200, 6_400]},
}


def plan_at(path: Path) -> Plan:
    return plan_with_rates(*load_study(path))


def results(path: Path) -> dict[str, tuple[Any, ...]]:
    """Return the table's values of each run, except for times and paths."""
    rows = collect(plan_at(path)).rows
    return {
        row.run: (
            *(row.status, row.loss, row.train_loss, row.tokens, row.training_flops, row.curve_loss),
            *(row.layer_steps, row.layer_curves, row.layer_values),
        )
        for row in rows
    }


@pytest.fixture(scope="module")
def finished(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran without interruption."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_study(folder, base_tree(small_data, folder / "none"), **STUDY)
    complete(path, "--jobs", "2")
    return path


def test_study_starts_each_run_as_a_command(small_data: SmallData, tmp_path: Path) -> None:
    study = {**STUDY, "variants": {"mha": {}}, "budgets": {"tokens": [3_200]}}
    path = write_study(tmp_path, base_tree(small_data, tmp_path / "none"), **study)
    (run,) = plan_at(path).runs
    done = subprocess.run(
        [sys.executable, "-m", "sas_megatron", "study", "run", str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    started, ended = done.stdout.splitlines()
    assert started == f"» {run.name}: started, 10 steps"
    assert re.fullmatch(rf"» {run.name}: done, validation loss \d\.\d+, \d+ s", ended)
    assert "validation" in log_path(run).read_text(), "the output of the run is not in its log"
    assert not is_locked(run)


def test_finished_study_is_collected_and_not_run_again(finished: Path) -> None:
    written = {
        file: file.stat().st_mtime_ns for file in (finished.parent / "study").rglob("*") if file.is_file()
    }
    assert complete(finished) == ""
    after = {
        file: file.stat().st_mtime_ns for file in (finished.parent / "study").rglob("*") if file.is_file()
    }
    assert after == written
    done = CliRunner().invoke(cli, ["study", "collect", str(finished), "--json"])
    assert done.exit_code == 0, done.output
    record = json.loads(done.output)
    assert (record["rows"], record["done"], record["remarks"]) == (4, 4, [])
    table = read_table(record["table"])
    assert table.baseline == "mha"
    assert [row.run for row in table.rows] == [
        *("mha-one-3200-s1234", "mha-one-6400-s1234", "sas-one-3200-s1234", "sas-one-6400-s1234")
    ]
    for row in table.rows:
        assert row.loss is not None
        assert 4 < row.loss < 6.5
        assert row.steps == row.tokens // 320
        assert row.curve_steps == list(range(5, row.steps + 1, 5))
        assert row.curve_loss[-1] == row.loss
        # What happens inside the models is measured at each evaluation, and at each step before one.
        assert row.layer_steps == row.curve_steps
        assert None not in row.layer_curves["update_ratio.mlp"]
        assert ("copy_similarity.query" in row.layer_curves) == (row.variant == "sas")
        assert row.training_flops == row.tokens * sum(row.flops_per_token.values()) == row.curve_flops[-1]
        assert row.flops_6nd == 6 * row.params * row.tokens
    # Branches of one trunk have the same loss before the branch point.
    short, long = table.rows[:2]
    assert short.curve_loss[0] == long.curve_loss[0]
    assert short.curve_loss[1] != long.curve_loss[1]
    # The two trunks are included.
    statuses = CliRunner().invoke(cli, ["study", "status", str(finished), "--json"])
    assert json.loads(statuses.output)["counts"] == {"done": 6}


def test_records_of_real_runs_give_the_same_table(finished: Path, tmp_path: Path) -> None:
    exported = export_records(plan_at(finished), tmp_path)
    assert len(exported.new) == 6
    assert max(path.stat().st_size for path in exported.folder.iterdir()) <= MAX_RECORD_BYTES
    assert collect_records(*load_study(finished), tmp_path).rows == collect(plan_at(finished)).rows


def times_of_finished(plan: Plan) -> dict[Path, int]:
    """Return the modification times of the results of the finished runs."""
    return {
        file: file.stat().st_mtime_ns
        for run in plan.runs
        if has_finished(run.directory)
        for file in (run.directory / "summary.json", run.directory / "metrics.jsonl")
    }


def test_killed_study_gives_the_same_table(small_data: SmallData, tmp_path: Path, finished: Path) -> None:
    path = write_study(tmp_path, base_tree(small_data, tmp_path / "none"), **STUDY)
    plan = plan_at(path)
    trunks = [run for run in plan.runs if run.role == "trunk"]
    branches = [run for run in plan.runs if run.role != "trunk"]
    with study_run(path, "--jobs", "2") as process:
        # Between two checkpoints, which are saved every 3 steps.
        wait_until(lambda: any(read_status(run).step >= 4 for run in trunks))
    assert process.wait() == -signal.SIGKILL, "ended before it could be killed"
    assert not all(has_finished(run.directory) for run in trunks)

    with study_run(path, "--jobs", "2") as process:
        # A run creates its directory itself.
        wait_until(lambda: any(run.directory.exists() for run in branches))
        process.kill()
        started = [run for run in branches if run.directory.exists()]
        finished_before = times_of_finished(plan)
        # The runs continue after the study is killed; they keep their locks and are not started again.
        assert any(is_locked(run) for run in started)
        assert all(is_locked(run) or has_finished(run.directory) for run in started)
        printed = complete(path, "--jobs", "2")
    assert process.wait() == -signal.SIGKILL, "ended before it could be killed"
    assert not [run.name for run in started if f"» {run.name}: started" in printed]
    assert times_of_finished(plan).items() >= finished_before.items(), "a finished run has run again"
    assert results(path) == results(finished)


@exhaustive
def test_study_killed_at_random_times_gives_the_same_table(
    small_data: SmallData, tmp_path: Path, finished: Path
) -> None:
    generator = random.Random(20)
    path = write_study(tmp_path, base_tree(small_data, tmp_path / "none"), **STUDY)
    finished_files: dict[Path, int] = {}
    for _ in range(20):
        with study_run(path, "--jobs", "2") as process:
            try:
                process.wait(timeout=generator.uniform(0.2, 3))
            except subprocess.TimeoutExpired:
                process.kill()
                # Its runs continue, here for some time before the study is started again.
                time.sleep(generator.choice([0, 0, generator.uniform(0, 3)]))
        for file, modified in finished_files.items():
            assert file.stat().st_mtime_ns == modified, f"{file} belongs to a finished run that has run again"
        finished_files = times_of_finished(plan_at(path))
    complete(path, "--jobs", "2")
    assert results(path) == results(finished)


def test_run_whose_lock_is_held_is_not_started(
    small_data: SmallData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path, base_tree(small_data, tmp_path / "none"), **STUDY)
    run = plan_at(path).runs[0]
    num_waits = 0

    def wait_twice(self: runner.StudyRunner) -> None:
        nonlocal num_waits
        assert not self._started
        num_waits += 1
        if num_waits == 2:
            raise TimeoutError("still waiting for the run of another process")

    monkeypatch.setattr(runner.StudyRunner, "_wait", wait_twice)
    with acquire_lock(run) as descriptor:
        assert descriptor is not None
        assert read_status(run).state == "running"
        with pytest.raises(TimeoutError):
            runner.StudyRunner(lambda: plan_at(path), jobs=2, log=print).run(selected=lambda r: r == run)
        assert not log_path(run).exists()


def test_stopped_study_saves_its_runs_and_reports_failures(small_data: SmallData, tmp_path: Path) -> None:
    # A run of many steps is stopped; another diverges and fails, so that its branches wait.
    sizes = {
        "good": {"model.num_layers": 1},
        "bad": {"model.num_layers": 1, "optimizer.learning_rate": 1e30, "optimizer.clip_gradient_norm": 0},
    }
    study = {**STUDY, "sizes": sizes, "variants": {"mha": {}}, "budgets": {"tokens": [3_200, 3_200_000]}}
    path = write_study(tmp_path, base_tree(small_data, tmp_path / "none"), **study)
    with study_run(path, "--jobs", "2", "--only", "*trunk*") as process:
        good, bad = [run for run in plan_at(path).runs if run.role == "trunk"]
        # The short branch starts at step 8 of the trunk.
        wait_until(lambda: read_status(good).step > 8 and read_status(bad).state == "failed")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
    assert f"» {good.name}: saved a checkpoint and stopped" in process.output()
    assert (good.directory / "stopped.json").exists()
    statuses = {run.name: read_status(run) for run in plan_at(path).runs}
    assert statuses[good.name].state == "interrupted"
    assert re.match(
        r".*TrainingFault: step 5 after 3 skipped in a row .* is nan", str(statuses[bad.name].reason)
    )
    assert statuses["mha-bad-3200-s1234"].state == "waiting"
    assert statuses["mha-good-3200-s1234"].state == "ready"
    shown = CliRunner().invoke(cli, ["study", "status", str(path)]).output
    assert "4 waiting" not in shown
    assert "of training remaining" in shown
    with pytest.raises(UserError, match=r"none of the study's 4 runs has finished"):
        collect(plan_at(path))


def test_runs_that_differ_from_the_plan_or_each_other_are_not_collected(
    small_data: SmallData, tmp_path: Path, finished: Path
) -> None:
    base = base_tree(small_data, finished.parent / "none")
    base["optimizer"]["weight_decay"] = 0.2
    base["evaluation"]["probe_sequences"] = 0
    other = write_study(tmp_path, base, **{**STUDY, "directory": str(finished.parent / "study")})
    with pytest.raises(UserError) as raised:
        collect(plan_at(other))
    assert "mha-one-3200-s1234: optimizer.weight_decay is 0.1, planned 0.2" in str(raised.value)
    assert "probe_sequences" not in str(raised.value), "it affects no result"
    # A finished run stays done, even if the plan has changed.
    complete(other, "--only", "sas*6400*")
    provenance = finished.parent / "study" / "runs" / "sas-one-6400-s1234" / "run.json"
    kept = provenance.read_text()
    try:
        tree = json.loads(kept)
        tree["packages"]["torch"] = "2.12.0"
        tree["machine"] = {"processor": "another"}
        provenance.write_text(json.dumps(tree))
        with pytest.raises(UserError, match=r'run\.json packages: .*"2\.12\.0".* in sas-one-6400-s1234'):
            collect(plan_at(finished))
        tree["packages"] = json.loads(kept)["packages"]
        provenance.write_text(json.dumps(tree))
        assert any(
            "their times are not comparable" in remark for remark in collect(plan_at(finished)).remarks
        )
    finally:
        provenance.write_text(kept)


@pytest.mark.parametrize("command", ["run", "status"])
def test_pattern_without_matching_run_is_refused(finished: Path, command: str) -> None:
    done = CliRunner().invoke(cli, ["study", command, str(finished), "--only", "nix*"])
    assert str(done.exception).startswith("--only=nix*: matches no run; use a name that `study plan` shows")


def test_missing_run_stays_missing_in_the_table(finished: Path) -> None:
    summary = finished.parent / "study" / "runs" / "sas-one-6400-s1234" / "summary.json"
    kept = summary.read_text()
    summary.unlink()
    try:
        table = collect(plan_at(finished))
    finally:
        summary.write_text(kept)
    (row,) = [row for row in table.rows if row.run == "sas-one-6400-s1234"]
    assert (row.status, row.loss, row.training_seconds, row.curve_loss) == ("missing", None, None, [])
    assert table.remarks == ("1 of 4 runs are missing: sas-one-6400-s1234.",)


def test_step_times_are_measured_and_added_to_the_table(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = fork_context()
    monkeypatch.setattr(rank_processes.multiprocessing, "get_context", lambda _method: context)
    done = CliRunner().invoke(cli, ["study", "time", str(finished), "--rounds", "2", "--on-busy-machine"])
    assert done.exit_code == 0, done.output
    path = finished.parent / "study" / "step_seconds.json"
    record = json.loads(path.read_text())
    seconds = {name: cell["step_seconds"] for name, cell in record["cells"].items()}
    assert {name: len(measured) for name, measured in seconds.items()} == {"mha-one": 2, "sas-one": 2}
    assert {row.run: row.step_seconds for row in collect(plan_at(finished)).rows if "3200" in row.run} == {
        f"{name}-3200-s1234": sum(measured) / 2 for name, measured in seconds.items()
    }

    # Step times of an earlier config are ignored; the learning rate does not affect them.
    assert "optimizer.learning_rate" not in record["cells"]["sas-one"]["config"]
    record["cells"]["sas-one"]["config"]["attention.head_expansion"] += 1
    path.write_text(json.dumps(record))
    table = collect(plan_at(finished))
    assert {row.variant for row in table.rows if row.step_seconds is None} == {"sas"}
    assert any("The step times of sas-one were not measured with" in remark for remark in table.remarks)
