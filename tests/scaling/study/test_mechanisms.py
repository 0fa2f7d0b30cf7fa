"""What happens inside the models of a study: from the records of runs to tables in report and terminal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import UserError
from sas_megatron.scaling.drawing import render
from sas_megatron.scaling.layer_measurements import join_measurements
from sas_megatron.scaling.study.mechanisms import MECHANISMS, choose_runs, mechanism_figure, mechanism_grid
from sas_megatron.scaling.study.study_table import write_table
from tests.scaling.study.synthetic_tables import build_synthetic_table, probe_layer, with_measurements


def update_layer(number: int) -> dict[str, Any]:
    return {"layer": number, "gradient_norm": {"attention": 2.0, "mlp": 4.0}, "update_ratio": {"mlp": None}}


RECORDS = [
    (10, [update_layer(1), update_layer(2)]),
    (10, [probe_layer(1, 0.99), probe_layer(2, 0.97)]),
    (20, [probe_layer(1, 0.1), probe_layer(2, 0.1)]),
    # Resumed from a checkpoint at step 10.
    (15, [probe_layer(1, 0.6), probe_layer(2, 0.4)]),
]


def test_records_of_a_run_are_joined_by_step_layer_and_head() -> None:
    found = join_measurements(RECORDS)
    assert found.steps == [10, 15]
    assert found.curves["copy_similarity.query"] == [pytest.approx(0.98), pytest.approx(0.5)]
    assert found.layers["copy_similarity.query"] == [0.6, 0.4]
    assert found.layers["largest_score"] == [7.0, 7.0]
    # A value that is not finite leaves its layer and its mean unknown.
    assert found.curves["mean_entropy"] == [None, 1.5]
    assert found.curves["gradient_norm.mlp"] == [4.0, None]
    assert found.curves["update_ratio.mlp"] == [None, None]
    assert join_measurements([]).steps == []


def test_the_last_update_is_that_of_the_last_step_with_one() -> None:
    found = join_measurements(
        (step, [{"layer": 1, "update_ratio": {"mlp": ratio}, "silent_units": {"heads.query": ratio}}])
        for step, ratio in ((1, 0.25), (2, 0.125), (3, 0.0))
    )
    assert found.curves["update_ratio.mlp"] == [0.25, 0.125, 0.0]
    assert found.layers == {"update_ratio.mlp": [0.125], "silent_units.heads.query": [0.0]}


def test_a_table_has_means_over_seeds_and_layers_and_names_the_extreme_layers() -> None:
    table = with_measurements(build_synthetic_table(num_sizes=2))
    by_variant = {
        variant: [row for row in table.rows if row.variant == variant] for variant in ("mha", "sas")
    }
    runs = choose_runs(by_variant)
    assert {row.size for rows in runs.values() for row in rows} == {"w1"}
    assert {row.budget for rows in runs.values() for row in rows} == {8.0}
    copies, silent, attention, *_ = (mechanism_grid(mechanism, runs) for mechanism in MECHANISMS)
    assert copies is not None
    # Three seeds: (layer + 10·seed) / step has the mean (2 + 10) / step.
    assert copies.lines == (
        ("sas", "key", "0.500", "0.500", "0.500 in 1", "0.500 in 3"),
        ("sas", "query", "0.120", "0.060", "0.055 in 1", "0.065 in 3"),
    )
    assert silent is not None
    assert silent.lines == (("sas", "heads query", "25.0 %", "25.0 %", "25.0 % in 1", "25.0 % in 3"),)
    assert attention is not None
    assert [line[:3] for line in attention.lines] == [
        ("mha", "mean entropy", "1.5"),
        ("mha", "largest score", "7"),
        ("sas", "mean entropy", "1.5"),
        ("sas", "largest score", "7"),
    ]
    figure = mechanism_figure(runs, name="mechanisms")
    assert figure is not None
    assert b"copy similarity, query" in render(figure.draw, size=figure.size, file_format="svg")


def test_the_command_prints_the_tables_in_80_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = with_measurements(build_synthetic_table(num_sizes=2))
    long = {"mha": "mha", "gqa": "sas_reparametrized", "sas": "sas_rotary_before"}
    rows = tuple(dataclasses.replace(row, variant=long[row.variant]) for row in table.rows)
    write_table(dataclasses.replace(table, rows=rows), tmp_path / "study.parquet")
    monkeypatch.setenv("COLUMNS", "80")
    command = ["study", "probes", str(tmp_path / "study.parquet")]
    printed = CliRunner().invoke(cli, command)
    assert printed.exit_code == 0, printed.output
    lines = printed.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "Do ReLU units of the simulation die?" in lines
    row = next(line for line in lines if line.startswith("sas_rotary_before"))
    assert row.split() == [
        "sas_rotary_before",
        "key",
        "0.500",
        "0.500",
        "0.500",
        "in",
        "1",
        "0.500",
        "in",
        "3",
    ]
    record = json.loads(CliRunner().invoke(cli, [*command, "--json"]).output)
    assert len(record) == 3 + 1 + 3
    assert record[-1]["layers"]["copy_similarity.key"] == 3 * [0.5]


def test_a_study_without_measurements_is_refused(tmp_path: Path) -> None:
    write_table(build_synthetic_table(num_sizes=2), tmp_path / "study.parquet")
    refused = CliRunner().invoke(cli, ["study", "probes", str(tmp_path / "study.parquet")])
    assert isinstance(refused.exception, UserError)
    assert "set evaluation.probe_sequences=2 in the study's base" in str(refused.exception)
