"""Tables of several studies that are merged for one report."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.scaling.study.analysis import analyze
from sas_megatron.scaling.study.grids import machine_grid, rate_grid
from sas_megatron.scaling.study.merged_tables import merge_tables
from sas_megatron.scaling.study.study_table import StudyTable, SweepRun
from tests.scaling.study.synthetic_tables import build_synthetic_table

TABLE = build_synthetic_table(num_sizes=1)


def part(name: str, *budgets: float, **changes: Any) -> StudyTable:
    """Return the part of the synthetic table with some budgets; `changes` replace fields of its rows."""
    rows = tuple(
        dataclasses.replace(row, study=name, **changes) for row in TABLE.rows if row.budget in budgets
    )
    return dataclasses.replace(TABLE, name=name, rows=rows)


def test_merged_studies_give_the_verdicts_of_one_study() -> None:
    merged = merge_tables([part("short", 2, 4), part("long", 8)])
    assert merged.name == "short, long"
    assert merged.remarks == ("short: A remark <of> it.", "long: A remark <of> it.")
    (ours,), (expected,) = analyze(merged, num_draws=50), analyze(TABLE, num_draws=50)
    for one, other in zip(ours.comparisons, expected.comparisons, strict=True):
        for verdict in one.verdicts:
            assert verdict.difference == pytest.approx(other.verdict(verdict.axis).difference)
            assert verdict.p_value == pytest.approx(other.verdict(verdict.axis).p_value)
    assert merge_tables([TABLE]) is TABLE


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dataclasses.replace(part("b", 8), baseline="gqa"), "the baseline of b is gqa, and that of a is mha"),
        (part("b", 4), "mha-w0-4-s0 is a run of both a and b; remove it from one study"),
        (part("b", 8, params=7), "mha at size w0 has params 100000 in a, and 7 in b; name the sizes"),
        (part("b", 8, corpus_sha256="22"), "the runs of a and b read different data"),
    ],
)
def test_studies_that_are_not_comparable_are_refused(other: StudyTable, message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_tables([part("a", 2, 4, corpus_sha256="11"), other])


def test_step_times_of_separate_measurements_are_not_compared() -> None:
    merged = merge_tables([part("a", 2, step_rounds=[1.0, 2.0]), part("b", 4, step_rounds=[3.0, 4.0])])
    assert {row.step_seconds for row in merged.rows} == {None}
    assert merged.remarks[-1].startswith("The step times of gqa-w0, mha-w0, sas-w0 were")
    same = merge_tables([part("a", 2, step_rounds=[1.0]), part("b", 4, step_rounds=[1.0])])
    assert None not in {row.step_seconds for row in same.rows}


def test_report_names_the_machine_and_the_commit_of_each_run() -> None:
    first = part("a", 2, host="h1", machine='{"processor": "x", "processors": 2}', git="c1")
    grid = machine_grid(merge_tables([first, part("b", 4, host="h2", git="c2")]))
    assert grid is not None
    assert [line[:5] for line in grid.lines] == [
        ("h1", "processor x, processors 2", "c1", "a", "7"),
        ("h2", "made up", "c2", "b", "7"),
    ]
    assert "sas-w0-2 (seeds 0, 1, 2)" in grid.lines[0][5].splitlines()
    assert machine_grid(TABLE) is None


def test_sweeps_of_different_budgets_are_not_mixed() -> None:
    def sweep(variant: str, budget: float, losses: tuple[float, ...]) -> list[SweepRun]:
        rates = (1e-3, 2e-3, 4e-3)
        return [
            SweepRun(variant, "w0", rate, loss, budget, 1) for rate, loss in zip(rates, losses, strict=True)
        ]

    runs = [
        *(*sweep("mha", 2, (4.2, 4.0, 4.1)), *sweep("sas", 2, (4.1, 3.8, 4.0))),
        *(*sweep("mha", 4, (3.2, 3.0, 3.1)), *sweep("sas", 4, (3.2, 3.1, 3.3))),
    ]
    grid = rate_grid(dataclasses.replace(TABLE, sweeps=tuple(runs)))
    assert grid is not None
    assert [line[:4] for line in grid.lines] == [
        ("sas", "w0", "2", "−0.2000"),
        ("sas", "w0", "4", "+0.1000"),
    ]
