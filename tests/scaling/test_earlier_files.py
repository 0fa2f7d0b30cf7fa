"""Files of earlier versions can still be read: run directories, study records and collected tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sas_megatron.scaling.run_comparison import compare_runs
from sas_megatron.scaling.runs import load_run
from sas_megatron.scaling.study.collecting import collect
from sas_megatron.scaling.study.plan import Plan
from sas_megatron.scaling.study.run_states import read_status
from sas_megatron.scaling.study.step_times import _is_measured_config, _list_timed_fields
from sas_megatron.scaling.study.study_file import load_study
from sas_megatron.scaling.study.study_table import read_table
from sas_megatron.scaling.study.submission import read_jobs
from sas_megatron.scaling.study.sweeps import plan_with_rates
from tests.run_configs import small_config

FIXTURES = Path(__file__).with_name("fixtures")
RUNS = ["mha-small-3200-s1234", "sas-small-3200-s1234"]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The study of the fixtures, in a directory of its own."""
    shutil.copytree(FIXTURES / "study", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return plan_with_rates(*load_study("study.yaml"))


def test_run_directory_of_an_earlier_version_is_loaded() -> None:
    run = load_run(FIXTURES / "runs" / "sas")
    assert (run.name, run.config.attention.kind, run.summary.steps) == ("sas", "sas", 20)
    assert [point.step for point in run.train_curve] == list(range(1, 21))
    assert [point.step for point in run.validation_curve] == [5, 10, 15, 20]
    assert run.validation_curve[-1].loss == run.summary.final_validation_loss == 5.2000042061011
    assert run.provenance["world_size"] == 1
    assert run.remarks == ()


def test_comparison_of_earlier_runs_gives_the_same_numbers() -> None:
    before = json.loads((FIXTURES / "runs" / "comparison.json").read_text(encoding="utf-8"))
    comparison = compare_runs([load_run(FIXTURES / "runs" / name) for name in ("mha", "sas")])
    for row, expected in zip(comparison.rows, before["rows"], strict=True):
        assert vars(row) == expected
    verdicts = [verdict for verdict in comparison.verdicts if verdict.axis != "causal_flops"]
    for verdict, expected in zip(verdicts, before["verdicts"], strict=True):
        assert verdict.budget == expected["budget"]
        assert verdict.difference == expected["difference"]


def test_records_of_an_earlier_study_are_read(plan: Plan) -> None:
    rates = json.loads(Path("study/learning_rates.json").read_text(encoding="utf-8"))["rates"]
    for run in plan.results:
        assert run.config.optimizer.learning_rate == rates[run.cell.variant][run.cell.size]
    assert {name: layout.step_seconds for name, layout in plan.layouts.items()} == {
        "mha-small": 0.01,
        "sas-small": 0.03,
    }
    jobs = read_jobs(plan)
    assert list(jobs) == ["mha-small-trunk-s1234", "mha-small-trunk-s1235", "sas-small-trunk-s1234"]
    assert jobs["mha-small-trunk-s1234"].number == "12_13"
    states = {run.name: read_status(run) for run in plan.runs if run.role != "sweep"}
    assert [name for name, status in states.items() if status.state == "done"] == [
        *("mha-small-trunk-s1234", RUNS[0], "sas-small-trunk-s1234", RUNS[1])
    ]
    failed = states["sas-large-trunk-s1234"]
    assert (failed.state, failed.reason) == ("failed", "ValueError: no")


def test_table_of_an_earlier_study_is_read_and_collected_again(plan: Plan) -> None:
    table = read_table("study/study.parquet")
    assert (table.name, table.baseline, len(table.rows)) == ("study", "mha", 12)
    assert all(row.status == "done" and len(row.curve_loss) > 0 for row in table.rows)
    expected = {row.run: vars(row) for row in table.rows}
    again = {row.run: vars(row) for row in collect(plan).rows if row.status == "done"}
    assert list(again) == RUNS
    for name, row in again.items():
        # Paths in run.json were shortened when the fixture was made.
        for fields in (row, expected[name]):
            fields["provenance_sha256"] = None
            # Added in version 4 of the table.
            fields |= {"study": None, "host": None, "corpus_sha256": None}
            # The first version of the table had only the median of the rounds.
            fields["step_rounds"] = []
        assert row == expected[name]


def test_step_times_stay_valid_if_a_later_version_adds_a_field_with_its_default() -> None:
    def cell(**model: Any) -> Any:
        return SimpleNamespace(config=small_config(model=model))

    recorded = _list_timed_fields(cell())
    assert _is_measured_config(cell(), recorded)
    del recorded["model.output_init"]
    assert _is_measured_config(cell(), recorded)
    assert not _is_measured_config(cell(output_init="wang"), recorded)
    assert not _is_measured_config(cell(num_layers=7), recorded)
    assert not _is_measured_config(cell(), {**recorded, "model.removed_field": 3})
