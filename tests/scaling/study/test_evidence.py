"""The evidence of a study's report: sweeps, step times, laws; and the reports of the shipped studies."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from sas_megatron.scaling.drawing import render
from sas_megatron.scaling.outcomes import gather_points
from sas_megatron.scaling.report import render_markdown
from sas_megatron.scaling.study.analysis import analyze, cut_slices
from sas_megatron.scaling.study.evidence_figures import build_mean_curves, sweep_figure
from sas_megatron.scaling.study.grids import difference_grid, law_grid, rate_grid
from sas_megatron.scaling.study.study_report import FILES, build_study_report
from sas_megatron.scaling.study.study_table import SweepRun, read_table
from tests.scaling.study.synthetic_tables import build_synthetic_table
from tests.selection import cases

SHIPPED = Path(__file__).parents[3] / "docs" / "studies"


@pytest.mark.parametrize(
    "name",
    cases(("python", "python_ablation", "python_lengths"), default=("python_ablation", "python_lengths")),
)
def test_shipped_summaries_follow_from_their_tables(name: str) -> None:
    report = build_study_report(read_table(SHIPPED / name / "study.parquet"))
    assert render_markdown(report, FILES) == (SHIPPED / name / "summary.md").read_text(encoding="utf-8")


def test_differences_are_shown_by_size_and_budget_with_the_noise() -> None:
    (analysis,) = analyze(build_synthetic_table(num_sizes=2, noise=0.01), num_draws=50)
    assert analysis.noise is not None
    grid = difference_grid(analysis.comparisons, "tokens", analysis.noise)
    assert grid is not None
    assert grid.headings == ("variant", "size", "budget 2", "budget 4", "budget 8")
    assert [line[:2] for line in grid.lines[:-1]] == [
        (variant, size) for variant in ("gqa", "sas") for size in ("w0", "w1")
    ]
    losses = {(row.variant, row.size, row.budget, row.seed): row.loss for row in analysis.slice.rows["mha"]}
    mean = np.mean([losses["mha", "w0", 2.0, seed] for seed in range(3)])
    (run,) = (row for row in analysis.slice.rows["gqa"] if (row.size, row.budget) == ("w0", 2.0))
    assert run.loss is not None
    assert float(grid.lines[0][2].replace("−", "-")) == pytest.approx(run.loss - mean, abs=1e-4)
    assert grid.lines[-1][0] == "deviation of a run over seeds"
    assert all(0.003 < float(cell) < 0.03 for cell in grid.lines[-1][2:])


def test_budgets_of_a_size_and_seed_are_drawn_together_for_a_law() -> None:
    (part,) = cut_slices(build_synthetic_table(num_sizes=3))
    points = gather_points(part.outcomes, "mha")
    assert (len(points), points.num_runs) == (3 * 3 * 3, 3 * 3)
    (single,) = cut_slices(build_synthetic_table(num_sizes=3, budgets=(4,)))
    assert gather_points(single.outcomes, "mha").runs is None


def test_learning_curves_are_drawn_for_every_size() -> None:
    (part,) = cut_slices(build_synthetic_table(num_sizes=3))
    for size in ("w0", "w1", "w2"):
        curves = build_mean_curves(part, size)
        assert [curve.label for curve in curves] == ["mha", "gqa", "sas"]
        longest = [row for row in part.rows["mha"] if (row.size, row.budget) == (size, 8.0)]
        assert curves[0].losses[-1] == pytest.approx(np.mean([row.loss or 0.0 for row in longest]))


def test_sweeps_are_compared_at_neighbouring_rates() -> None:
    losses = {"mha": (4.2, 4.0, 4.1), "sas": (None, 3.9, 4.05)}
    runs = tuple(
        SweepRun(variant, "w0", rate, loss)
        for variant, by_rate in losses.items()
        for rate, loss in zip((0.001, 0.002, 0.004), by_rate, strict=True)
    )
    table = dataclasses.replace(build_synthetic_table(num_sizes=1), sweeps=runs)
    grid = rate_grid(table)
    assert grid is not None
    assert grid.headings[2:] == (
        "budget",
        *("best rates", "variant: lower rate", "variant: higher rate", "mha: lower rate", "mha: higher rate"),
    )
    assert grid.lines == (("sas", "w0", "–", "−0.1000", "–", "+0.0500", "−0.3000", "−0.2000"),)
    assert rate_grid(build_synthetic_table()) is None
    (analysis,) = analyze(table, num_draws=50)
    figure = sweep_figure(analysis.slice, runs)
    assert figure is not None
    drawing = render(figure.draw, size=figure.size, file_format="svg").decode()
    assert drawing.count("peak learning rate") == 1


def test_error_of_step_times_is_pooled_over_cells() -> None:
    generator = np.random.default_rng(0)
    busy = np.exp(0.5 * generator.standard_normal(5))
    rounds: dict[tuple[str, str], list[float]] = {}
    rows = []
    for row in build_synthetic_table().rows:
        key = row.variant, row.size
        measured = (row.step_seconds or 0.0) * busy * np.exp(0.03 * generator.standard_normal(5))
        rows.append(dataclasses.replace(row, step_rounds=rounds.setdefault(key, measured.tolist())))
    (part,) = cut_slices(dataclasses.replace(build_synthetic_table(), rows=tuple(rows)))
    # The variance of a median of five normal values is 0.287 times that of a value (Kenney and Keeping 1962);
    # the load that all cells of a round share cancels in a comparison.
    error = part.outcomes[0].seconds_error
    assert error is not None
    assert 0.03 * 0.287**0.5 * 0.8 < error < 0.03 * 0.287**0.5 * 1.4
    (unmeasured,) = cut_slices(build_synthetic_table())
    assert unmeasured.outcomes[0].seconds_error is None


def test_law_without_a_determined_irreducible_loss_is_not_printed() -> None:
    (analysis,) = analyze(build_synthetic_table(seeds={"mha": 1, "sas": 1}, noise=0.3), num_draws=50)
    reasons = {law.reason for law in analysis.laws if law.fit is None}
    assert reasons
    assert all("determine" in str(reason) or "needs at least" in str(reason) for reason in reasons)
    grid = law_grid(analysis)
    assert grid is None or all("0.0000" not in cell for line in grid.lines for cell in line[2:3])
