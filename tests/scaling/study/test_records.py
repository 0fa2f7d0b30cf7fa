"""Compact records: what they keep of a run, and studies that continue from records on another machine."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FileProblem, UserError
from sas_megatron.scaling import report as report_module
from sas_megatron.scaling.study.collecting import collect
from sas_megatron.scaling.study.plan import Plan
from sas_megatron.scaling.study.record_exchange import export_records, import_records
from sas_megatron.scaling.study.run_records import (
    MAX_RECORD_BYTES,
    build_run_record,
    read_record,
    thin_metrics,
)
from sas_megatron.scaling.study.run_states import is_settled
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.scaling.study.studies import leave_run, write_study

STUDY: dict[str, Any] = {"trunks": "none", "seeds": 2, "sizes": {"small": {"model.hidden_size": 24}}}
SWEEP = {"rule": "sweep", "factors": [0.5, 1, 2], "sweep_sizes": ["small"]}


def planner(folder: Path, **changes: Any) -> Callable[[], Plan]:
    folder.mkdir(exist_ok=True)
    loaded = load_study(write_study(folder, **{**STUDY, **changes}))
    return lambda: plan_with_rates(*loaded)


def leave_all(load_plan: Callable[[], Plan]) -> None:
    """Leave a finished run for each run of a plan; of a sweep, the highest rate diverged."""
    for _ in range(2):
        for run in load_plan().runs:
            if run.is_ready and not is_settled(run):
                diverged = run.name.endswith("x2")
                leave_run(run, loss=4.0 + run.seed / 1e4, exit_reason=None if diverged else "finished")


def test_imported_runs_count_as_done_on_another_machine(tmp_path: Path) -> None:
    here, there = (
        planner(tmp_path / "here", learning_rate=SWEEP),
        planner(tmp_path / "there", learning_rate=SWEEP),
    )
    leave_all(here)
    step_seconds = {"machine": {"processor": "x"}, "measured_at": "now", "cells": {}}
    (here().directory / "step_seconds.json").write_text(json.dumps(step_seconds))
    exported = export_records(here(), tmp_path / "records")
    assert (len(exported.new), exported.known) == (14, ())
    imported = import_records(there, tmp_path / "records")
    assert imported.new == tuple(sorted(exported.new))
    plan = there()
    assert all(run.is_ready and is_settled(run) for run in plan.runs)
    ours, theirs = (collect(load_plan()) for load_plan in (here, there))
    assert ours.rows == theirs.rows
    assert ours.sweeps == theirs.sweeps
    assert any("Step times were measured on processor x" in remark for remark in theirs.remarks)
    # Files of the study that this machine does not have are kept.
    (there().directory / "step_seconds.json").unlink()
    export_records(there(), tmp_path / "records")
    assert "step_seconds.json" in read_record(exported.folder / "study.json.gz").files
    # Nothing is new the second time, and the records of imported runs are the original ones.
    assert import_records(there, tmp_path / "records").new == ()
    again = export_records(there(), tmp_path / "again")
    for path in again.folder.glob("*-*"):
        assert path.read_bytes() == (exported.folder / path.name).read_bytes()


def test_record_of_a_long_run_has_at_most_20_kilobytes_and_all_evaluations(tmp_path: Path) -> None:
    (run, *_) = planner(tmp_path)().runs
    leave_run(run)
    generator = random.Random(1)
    lines = []
    for step in range(1, 4001):
        position = {
            "step": step,
            "consumed_tokens": step,
            "training_flops": step * 1e9,
            "elapsed_seconds": step / 7,
        }
        lines.append({"kind": "train", **position, "train_loss": generator.random()})
        if step % 100 == 0:
            layers = [[generator.random() for _ in range(30)] for _ in range(4)]
            lines.append({"kind": "validation", **position, "validation_loss": generator.random()})
            lines.append({"kind": "probe", **position, "layers": layers})
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = build_run_record(run.directory, study="study")
    assert len(record.compress()) <= MAX_RECORD_BYTES
    kept = [json.loads(line) for line in record.files["metrics.jsonl"].splitlines()]
    assert [line for line in kept if line["kind"] == "validation"] == [
        line for line in lines if line["kind"] == "validation"
    ]
    assert sum(line["kind"] == "probe" for line in kept) >= 2
    assert sum(line["kind"] == "train" for line in kept) >= 8
    assert record.left_out["train"] == 4000 - sum(line["kind"] == "train" for line in kept)
    # The same run gives the same bytes.
    assert build_run_record(run.directory, study="study").compress() == record.compress()


def test_kept_lines_are_evenly_spaced_and_include_the_first_and_the_last() -> None:
    lines = [json.dumps({"kind": "train", "step": step}) for step in range(1, 11)]
    kept, left_out = thin_metrics([*lines, "damaged {"], {"train": 4})
    assert [json.loads(line)["step"] for line in kept] == [1, 4, 7, 10]
    assert left_out == {"train": 6, "unreadable": 1}
    assert thin_metrics(lines, {"train": 1})[0] == lines[-1:]
    assert thin_metrics(lines, {}) == (lines, {})


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """The folder of the records of a finished study."""
    load_plan = planner(tmp_path / "here")
    leave_all(load_plan)
    return export_records(load_plan(), tmp_path / "records").folder


def refuse(folder: Path, message: str, **changes: Any) -> None:
    """Check that the records next to a folder are refused by a new study there, and nothing is written."""
    load_plan = planner(folder, **changes)
    with pytest.raises(UserError, match=message):
        import_records(load_plan, folder.parent / "records")
    assert not any(is_settled(run) for run in load_plan().runs)
    assert list((folder / "study").glob("*")) == []


@pytest.mark.parametrize("damage", ["truncated", "not compressed", "changed", "other schema", "device"])
def test_damaged_records_are_refused(exported: Path, tmp_path: Path, damage: str) -> None:
    path = sorted(exported.iterdir())[-1]
    content, message = path.read_bytes(), r"is damaged \("
    record = json.loads(gzip.decompress(content))
    if damage == "truncated":
        path.write_bytes(content[:-20])
    elif damage == "not compressed":
        path.write_bytes(gzip.decompress(content))
    elif damage == "device":
        path.unlink()
        path.mkdir()
        message = "is damaged .Not a regular file"
    elif damage == "changed":
        record["files"]["summary.json"] = record["files"]["summary.json"].replace("4.1235", "3.1235")
        path.write_bytes(gzip.compress(json.dumps(record).encode()))
        message = "its contents differ from their SHA-256"
    else:
        path.write_bytes(gzip.compress(json.dumps({**record, "schema_version": 9}).encode()))
        message = "has schema version 9, not 1, of a record"
    refuse(tmp_path / "there", message)


def test_records_of_other_runs_are_refused(exported: Path, tmp_path: Path) -> None:
    other = {"learning_rate": {"rule": "stated", "rates": {"mha": 3e-4, "sas": 1e-3}}}
    refuse(tmp_path / "a", r"a run with optimizer\.learning_rate=0.0003, but the study plans 0.001", **other)
    refuse(tmp_path / "b", "which is not a run of this study", seeds=1)
    refuse(
        tmp_path / "c", "contains no records; name the folder that `study export` wrote", directory="c/other"
    )
    path = sorted(exported.iterdir())[0]
    record = read_record(path)
    # The checksum fits, but a file of the run is not that of a finished run.
    files = {**record.files, "summary.json": '{"exit_reason": "failed", "steps": 1, "tokens": 1}'}
    path.write_bytes(record.model_copy(update={"files": files}).compress())
    refuse(tmp_path / "d", r"contains a summary\.json that the run stopped at step 1")
    path.write_bytes(record.model_copy(update={"files": {"../evil": "x"}}).compress())
    refuse(tmp_path / "e", r"contains unknown files \['\.\./evil'\]")


def test_runs_of_this_machine_are_not_replaced(exported: Path, tmp_path: Path) -> None:
    load_plan = planner(tmp_path / "there")
    (run, *_) = load_plan().runs
    leave_run(run)
    (run.directory / "run.json").write_text('{"world_size": 1}')
    with pytest.raises(FileProblem, match="is the record of another run than that in"):
        import_records(load_plan, exported.parent)
    (run.directory / "summary.json").unlink()
    with pytest.raises(FileProblem, match=r"was started here .* and has not finished; stop that run"):
        import_records(load_plan, exported.parent)
    shutil.rmtree(run.directory)
    assert len(import_records(load_plan, exported.parent).new) == 8
    (run.directory / "record.json.gz").unlink()
    (run.directory / "run.json").write_text('{"world_size": 1}')
    with pytest.raises(FileProblem, match="is the record of another run than that in"):
        export_records(load_plan(), exported.parent)


def test_a_trunk_is_imported_with_all_of_its_branches_only(tmp_path: Path) -> None:
    here, there = planner(tmp_path / "here", trunks="shared"), planner(tmp_path / "there", trunks="shared")
    leave_all(here)
    branch = next(run for run in here().runs if run.role == "branch")
    shutil.rmtree(branch.directory)
    export_records(here(), tmp_path / "records")
    imported = import_records(there, tmp_path / "records")
    assert imported.remarks == (f"{branch.trunk} was not imported, since its branches need its checkpoints",)
    missing = {run.name for run in there().runs if not is_settled(run)}
    assert missing == {branch.name, branch.trunk}


def test_one_command_reports_on_the_records_of_several_studies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "render", lambda *_, **__: b"drawing")
    monkeypatch.setattr(report_module, "embed_svg", lambda *_, **__: "drawing")
    common = {"seed_noise": 0.01, "seeds": 3}
    stages = {"a": {"budgets": {"tokens": [5_000]}}, "b": {"budgets": {"tokens": [10_000]}}}
    paths = []
    for name, changes in stages.items():
        load_plan = planner(tmp_path / name, directory=str(tmp_path / "runs" / name), **common, **changes)
        leave_all(load_plan)
        exported = CliRunner().invoke(
            cli, ["study", "export", str(tmp_path / name / "study.yaml"), str(tmp_path / "records")]
        )
        assert exported.output == f"» 6 runs exported: {tmp_path}/records/{name}\n", exported.exception
        paths.append(str(tmp_path / name / "study.yaml"))
    shutil.rmtree(tmp_path / "runs")
    options = [
        "--records",
        str(tmp_path / "records"),
        "--output",
        str(tmp_path / "report"),
        "--bootstraps",
        "50",
    ]
    written = CliRunner().invoke(cli, ["study", "report", *paths, *options])
    assert written.exit_code == 0, written.exception
    summary = (tmp_path / "report" / "summary.md").read_text()
    assert summary.startswith("# a, b: sas against mha\n")
    assert "12 of 12 finished" in summary
    assert not (tmp_path / "runs").exists()
    refused = CliRunner().invoke(cli, ["study", "report", *paths])
    assert "--output=: must name a folder for a report on records or several studies" in str(
        refused.exception
    )
