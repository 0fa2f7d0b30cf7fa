"""Tables of a study's report: verdicts, gains, savings, laws, exponents and runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from sas_megatron.data.epochs import format_epochs
from sas_megatron.scaling.budget_trend import estimate_trend
from sas_megatron.scaling.comparison import Comparison
from sas_megatron.scaling.convergence import MeanSaving
from sas_megatron.scaling.gains import Gain
from sas_megatron.scaling.matched_cells import CellDifference
from sas_megatron.scaling.numbers import (
    MISSING,
    format_count,
    format_difference,
    format_duration,
    format_exact,
    format_fields,
    format_interval,
    format_loss,
    format_p_value,
    format_power,
    format_ratio,
    format_share,
    format_significant,
)
from sas_megatron.scaling.outcomes import AXES, AXIS_NAMES, Axis
from sas_megatron.scaling.report import Grid
from sas_megatron.scaling.seed_noise import NoiseModel
from sas_megatron.scaling.significance import MAX_SEEDS, Estimate
from sas_megatron.scaling.study.analysis import SliceAnalysis
from sas_megatron.scaling.study.study_table import Row, StudyTable, SweepCell, SweepRun
from sas_megatron.scaling.verdicts import Verdict

AxisGroups = Sequence[tuple[Axis, ...]]


def group_axes(comparisons: Sequence[Comparison]) -> list[tuple[Axis, ...]]:
    """Return the axes, with those together on which all verdicts are the same."""
    groups: dict[tuple[str, ...], list[Axis]] = {}
    for axis in AXES:
        verdicts = [comparison.verdict(axis) for comparison in comparisons]
        if any(verdict.estimate is not None for verdict in verdicts):
            groups.setdefault(tuple(verdict.statement for verdict in verdicts), []).append(axis)
    return [tuple(axes) for axes in groups.values()]


def name_axes(axes: Sequence[Axis]) -> str:
    """Return axes in words; equal parameters include equal tokens."""
    included = {"tokens": "params", "causal_flops": "flops"}
    named = [axis for axis in axes if included.get(axis) not in axes]
    both = " (by both conventions)" if {"flops", "causal_flops"} <= {*axes} else ""
    return ", ".join(f"equal {AXIS_NAMES[axis]}{both * (axis == 'flops')}" for axis in named)


def verdict_grid(comparisons: Sequence[Comparison], groups: AxisGroups, withdrawn: Sequence[str]) -> Grid:
    """Return by variant and axis: the result, the mean difference, its interval and its p-value."""
    headings = ("variant", *(f"at {name_axes(axes)}" for axes in groups))
    lines = [
        (comparison.candidate, *(_format_verdict(comparison.verdict(axes[0])) for axes in groups))
        for comparison in comparisons
    ]
    lines += [(variant, *("withdrawn" for _ in groups)) for variant in withdrawn]
    return Grid(headings, tuple(lines), "verdict")


def _format_verdict(verdict: Verdict) -> str:
    estimate = verdict.estimate
    if estimate is None:
        return "not compared"
    text = f"{verdict.result}\n{format_difference(estimate.difference)}"
    if estimate.interval is not None:
        text += f" ({format_interval(estimate.interval, format_difference)})"
        text += f"\n{format_p_value(verdict.p_value)}, {estimate.degrees:.2g} df"
    if estimate.interval is not None and verdict.result == "inconclusive":
        text += f", {verdict.seeds_needed or f'> {MAX_SEEDS}'} seeds"
    if verdict.same_size is not None:
        text += f"\nbest sizes; same sizes {format_difference(verdict.same_size.difference)}"
    return text


def difference_grid(comparisons: Sequence[Comparison], axis: Axis, noise: NoiseModel) -> Grid | None:
    """Return the differences by size and budget; None without any.

    The last line is the deviation of a run over seeds.
    """
    cells: dict[tuple[str, str | None], dict[str, str]] = {
        (comparison.candidate, cell.size): {}
        for comparison in comparisons
        for cell in _list_cells(comparison, axis)
    }
    for comparison in comparisons:
        for cell in _list_cells(comparison, axis):
            cells[comparison.candidate, cell.size][cell.budget] = format_difference(cell.difference)
    if not cells:
        return None
    budgets = sorted({budget for by_budget in cells.values() for budget in by_budget}, key=float)
    lines = [
        (variant, size or "best", *(by_budget.get(budget, MISSING) for budget in budgets))
        for (variant, size), by_budget in cells.items()
    ]
    if noise.degrees:
        deviations = (format_loss(noise.deviations[budget]) for budget in budgets)
        lines.append(("deviation of a run over seeds", "all", *deviations))
    return Grid(("variant", "size", *(f"budget {budget}" for budget in budgets)), tuple(lines), "total")


def _list_cells(comparison: Comparison, axis: Axis) -> tuple[CellDifference, ...]:
    return comparison.verdict(axis).cells


def trend_grid(comparisons: Sequence[Comparison], noise: NoiseModel) -> Grid | None:
    """Return the change of each difference per tenfold amount; None if the runs have almost one budget."""
    axes: tuple[Axis, ...] = ("tokens", "flops", "causal_flops")
    lines = []
    for comparison in comparisons:
        trends = [estimate_trend(comparison.verdict(axis), noise) for axis in axes]
        if any(trends):
            cells = (MISSING if trend is None else _format_trend(trend) for trend in trends)
            lines.append((comparison.candidate, *cells))
    headings = ("variant", *(f"per tenfold {AXIS_NAMES[axis]}" for axis in axes))
    return Grid(headings, tuple(lines)) if lines else None


def _format_trend(trend: Estimate) -> str:
    text = format_difference(trend.difference)
    if trend.interval is None:
        return text
    interval = format_interval(trend.interval, format_difference)
    return f"{text} ({interval})\n{format_p_value(trend.p_value)}, {trend.degrees:.2g} df"


def gain_grid(comparisons: Sequence[Comparison]) -> Grid | None:
    """Return the gains at the smallest, middle and largest budget with a gain; None without any."""
    lines = []
    for comparison in comparisons:
        for axis, gains in comparison.gains.items():
            known = [gain for gain in gains if gain.gain is not None]
            if not known:
                continue
            chosen = [known[0], known[len(known) // 2], known[-1]]
            cells = [f"{_format_gain(gain)}\nat {_format_budget(axis, gain.budget)}" for gain in chosen]
            lines.append((f"{comparison.candidate}, {AXIS_NAMES[axis]}", *cells))
    headings = ("gain", "smallest budget", "middle budget", "largest budget")
    return Grid(headings, tuple(lines)) if lines else None


def _format_budget(axis: Axis, budget: float) -> str:
    return format_duration(budget) if axis == "seconds" else f"{format_power(budget)} FLOPs"


def _format_gain(gain: Gain) -> str:
    text = format_ratio(gain.gain)
    if gain.interval is None:
        return text
    return f"{text} ({format_interval(gain.interval, '{:.3f}'.format)})"


def rate_grid(table: StudyTable) -> Grid | None:
    """Return the differences at the best swept rates and at their neighbours; None without a sweep."""
    sweeps: dict[tuple[str, SweepCell], list[SweepRun]] = {}
    for run in table.sweeps:
        sweeps.setdefault((run.variant, run.cell), []).append(run)
    lines = []
    for (variant, cell), runs in sweeps.items():
        if variant == table.baseline or (table.baseline, cell) not in sweeps:
            continue
        ours, theirs = _losses_around_best(runs), _losses_around_best(sweeps[table.baseline, cell])
        pairs = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
        differences = [ours[one] - theirs[other] for one, other in pairs]
        cells = [MISSING if math.isnan(value) else format_difference(value) for value in differences]
        size, budget, _ = cell
        lines.append((variant, size, MISSING if budget is None else f"{budget:g}", *cells))
    names = [f"{name}: {side} rate" for name in ("variant", table.baseline) for side in ("lower", "higher")]
    headings = ("variant", "size", "budget", "best rates", *names)
    return Grid(headings, tuple(lines)) if lines else None


def machine_grid(table: StudyTable) -> Grid | None:
    """Return which machine and commit made which runs; None if no row names its host."""
    groups: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in table.rows:
        if row.status == "done" and row.host is not None:
            machine = describe_machine(row.machine) if row.machine else MISSING
            of_study = groups.setdefault((row.host, machine, row.git or MISSING), {})
            of_study.setdefault(row.study or MISSING, []).append(row)
    lines = []
    for made, by_study in groups.items():
        for study, rows in by_study.items():
            seeds: dict[str, list[str]] = {}
            for row in rows:
                seeds.setdefault(f"{row.variant}-{row.size}-{row.budget:g}", []).append(str(row.seed))
            names = "\n".join(f"{cell} (seeds {', '.join(found)})" for cell, found in seeds.items())
            lines.append((*made, study, str(len(rows)), names))
    headings = ("host", "machine", "commit", "study", "runs", "variant, size and budget")
    return Grid(headings, tuple(lines), "texts") if lines else None


def describe_machine(record: str) -> str:
    """Return the machine of run.json, a JSON text in the table, in words."""
    try:
        machine = json.loads(record)
    except ValueError:
        return record
    return format_fields(machine) if isinstance(machine, dict) else record


def _losses_around_best(runs: Sequence[SweepRun]) -> list[float]:
    """Return the losses at the next lower, the best and the next higher rate; NaN if there is none."""
    ordered = sorted(runs, key=lambda run: run.learning_rate)
    losses = [math.nan, *(math.nan if run.loss is None else run.loss for run in ordered), math.nan]
    best = min(range(len(losses)), key=lambda index: math.inf if math.isnan(losses[index]) else losses[index])
    return [losses[best + shift] if 0 <= best + shift < len(losses) else math.nan for shift in (-1, 0, 1)]


def saving_grid(comparisons: Sequence[Comparison]) -> Grid | None:
    """Return the share of steps that each variant saves, by size and budget; None without pairs of runs."""
    savings = [saving for comparison in comparisons for saving in comparison.savings]
    if not savings:
        return None
    budgets = sorted({saving.budget for saving in savings}, key=float)
    lines: dict[tuple[str, str], list[str]] = {}
    for saving in savings:
        cells = lines.setdefault((saving.candidate, saving.size), [MISSING] * len(budgets))
        cells[budgets.index(saving.budget)] = _format_saving(saving)
    headings = ("variant", "size", *(f"budget {budget}" for budget in budgets))
    return Grid(headings, tuple((*labels, *cells) for labels, cells in lines.items()))


def _format_saving(saving: MeanSaving) -> str:
    if saving.saving is None:
        return "not reached" if saving.is_comparable else "not comparable"
    if saving.interval is None:
        return f"{format_share(saving.saving)}\n(one seed)"
    return f"{format_share(saving.saving)}\n({format_interval(saving.interval, format_share)})"


def law_grid(analysis: SliceAnalysis) -> Grid | None:
    """Return the parameters of each variant's law with their bootstrap intervals; None without any law."""
    lines = []
    for law in analysis.laws:
        if law.fit is None:
            continue
        surface = law.fit.fit.surface
        cells = [
            f"{form(getattr(surface, name))}\n{format_interval(law.fit.ci95[name], form)}"
            for name, form in (
                ("E", format_loss),
                *((name, format_significant) for name in ("A", "B", "alpha", "beta")),
            )
        ]
        lines.append((law.variant, str(len(law.fit.fit.points)), *cells))
    return Grid(("variant", "points", "E", "A", "B", "α", "β"), tuple(lines)) if lines else None


def exponent_grid(analysis: SliceAnalysis) -> Grid | None:
    """Return the exponents of compute and the prediction error of the largest runs; None without any law."""
    lines = []
    for law in analysis.laws:
        if law.fit is None or law.causal_exponents is None:
            continue
        best = law.fit.compute_optimal
        cells = [
            f"{best.exponents[name]:.3f} ({format_interval(best.ci95[name])})\n"
            f"causal half {law.causal_exponents[name]:.3f}"
            for name in ("params_exponent", "tokens_exponent", "loss_exponent")
        ]
        hold_out = law.fit.hold_out
        prediction = MISSING
        if hold_out is not None:
            prediction = (
                f"{format_share(hold_out.root_mean_square_error)} error\nof {len(hold_out.runs)} runs"
            )
        lines.append((law.variant, *cells, prediction))
    headings = ("variant", "optimal N", "optimal D", "loss above E", "largest runs")
    return Grid(headings, tuple(lines)) if lines else None


def run_grid(analysis: SliceAnalysis) -> Grid:
    """Return all runs with their planned and measured values."""
    headings: tuple[str, ...] = (
        *("run", "status", "parameters", "tokens", "FLOPs", "6ND", "learning rate", "loss", "bits/byte"),
        *("time", "run.json"),
    )
    rows = [row for of_variant in analysis.slice.rows.values() for row in of_variant]
    lines = [_build_run_line(row) for row in rows]
    if any(row.epochs is not None for row in rows):
        headings = (*headings[:-1], "epochs", headings[-1])
        lines = [
            (*line[:-1], MISSING if row.epochs is None else format_epochs(row.epochs), line[-1])
            for line, row in zip(lines, rows, strict=True)
        ]
    return Grid(headings, tuple(lines), "runs")


def _build_run_line(row: Row) -> tuple[str, ...]:
    return (
        row.run,
        row.status,
        format_exact(row.params),
        format_count(row.tokens),
        format_power(row.training_flops),
        format_power(row.flops_6nd),
        f"{row.learning_rate:.3g}",
        format_loss(row.loss),
        format_loss(row.bits_per_byte),
        format_duration(row.training_seconds),
        MISSING if row.provenance_sha256 is None else row.provenance_sha256[:12],
    )
