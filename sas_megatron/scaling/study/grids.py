"""Tables of a study's report: verdicts, gains, savings, laws, exponents and runs."""

from __future__ import annotations

from collections.abc import Sequence

from sas_megatron.data.epochs import format_epochs
from sas_megatron.scaling.comparison import Comparison
from sas_megatron.scaling.convergence import MeanSaving
from sas_megatron.scaling.gains import Gain
from sas_megatron.scaling.numbers import (
    MISSING,
    format_count,
    format_difference,
    format_duration,
    format_exact,
    format_interval,
    format_loss,
    format_power,
    format_ratio,
    format_share,
    format_significant,
)
from sas_megatron.scaling.outcomes import AXIS_NAMES
from sas_megatron.scaling.report import Grid
from sas_megatron.scaling.study.analysis import SliceAnalysis
from sas_megatron.scaling.study.study_table import Row


def verdict_grid(comparisons: Sequence[Comparison]) -> Grid:
    """Return by variant and axis: the result, the mean difference and its interval."""
    headings = ("variant", *(f"at equal {name}" for name in AXIS_NAMES.values()))
    lines = []
    for comparison in comparisons:
        cells = []
        for verdict in comparison.verdicts:
            if verdict.mean is None:
                cells.append("not compared")
                continue
            text = f"{verdict.result}\n{format_difference(verdict.mean.difference)}"
            if verdict.mean.interval is not None:
                text += f" ({format_interval(verdict.mean.interval, format_difference)})"
            cells.append(text)
        lines.append((comparison.candidate, *cells))
    return Grid(headings, tuple(lines), "verdict")


def gain_grid(comparisons: Sequence[Comparison]) -> Grid | None:
    """Return the gains at the smallest, middle and largest budget with a gain; None without any."""
    lines = []
    for comparison in comparisons:
        for kind, gains, format_budget in (
            ("compute", comparison.compute_gains, lambda budget: f"{format_power(budget)} FLOPs"),
            ("time", comparison.time_gains, format_duration),
        ):
            known = [gain for gain in gains or () if gain.gain is not None]
            if not known:
                continue
            chosen = [known[0], known[len(known) // 2], known[-1]]
            cells = [f"{_format_gain(gain)}\nat {format_budget(gain.budget)}" for gain in chosen]
            lines.append((f"{comparison.candidate}, {kind}", *cells))
    headings = ("gain", "smallest budget", "middle budget", "largest budget")
    return Grid(headings, tuple(lines)) if lines else None


def _format_gain(gain: Gain) -> str:
    text = format_ratio(gain.gain)
    if gain.gain_interval is None:
        return text
    return f"{text} ({format_interval(gain.gain_interval, '{:.3f}'.format)})"


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
        if law.fit is None:
            continue
        best = law.fit.compute_optimal
        cells = [
            f"{best.exponents[name]:.3f}\n{format_interval(best.ci95[name])}"
            for name in ("params_exponent", "tokens_exponent", "loss_exponent")
        ]
        hold_out = law.fit.hold_out
        prediction = MISSING
        if hold_out is not None:
            prediction = (
                f"{format_share(hold_out.root_mean_square_error)} error\n"
                f"{format_share(hold_out.share_inside)} in interval"
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
