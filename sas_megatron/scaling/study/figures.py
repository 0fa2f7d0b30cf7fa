"""Figures of one slice of a study: final losses, learning curves, gains, laws and costs.

A variant keeps its colour, marker and line style in all figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sas_megatron.scaling.drawing import COLORS, INK, choose_style
from sas_megatron.scaling.gains import Gain
from sas_megatron.scaling.outcomes import AXIS_NAMES, SPENDING
from sas_megatron.scaling.report import ReportFigure
from sas_megatron.scaling.study.analysis import Slice, SliceAnalysis
from sas_megatron.scaling.study.evidence_figures import curve_figure, sweep_figure
from sas_megatron.scaling.study.law_figures import LOSS_LABEL, format_thousands, list_law_figures
from sas_megatron.scaling.study.study_table import Row, SweepRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Gains outside this range are cut off.
GAIN_RANGE, GAIN_TICKS = (0.2, 5.0), (0.25, 0.5, 1.0, 2.0, 4.0)
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---", "ooo", "+++")


def list_figures(analysis: SliceAnalysis, sweeps: Sequence[SweepRun]) -> list[ReportFigure]:
    """Return the figures for which the slice has data."""
    variants = list(analysis.slice.rows)
    figures = [
        ReportFigure(
            "frontier",
            "Final loss against training FLOPs",
            f"Final validation loss of every run of {', '.join(variants)} against its training FLOPs. Runs "
            "of one size are joined; a point is the mean over seeds, with their range.",
            (9.0, 5.2),
            lambda figure: _draw_frontier(figure, analysis.slice),
        ),
        curve_figure(analysis.slice),
    ]
    swept = sweep_figure(analysis.slice, sweeps)
    figures += [] if swept is None else [swept]
    if any(comparison.gains for comparison in analysis.comparisons):
        figures.append(
            ReportFigure(
                "gain",
                "Gain against budget",
                "Budget that the baseline needs for the loss of the variant, as a multiple of the variant's "
                "budget, with 95 % bands. Above 1 the variant is worth its cost.",
                (12.5, 4.4),
                lambda figure: _draw_gains(figure, analysis),
            )
        )
    figures += list_law_figures(analysis)
    figures.append(
        ReportFigure(
            "costs",
            "Training FLOPs per token by term, at the largest size",
            "Training FLOPs per token by term, for the largest size of each variant.",
            (9.0, 1.4 + 0.5 * len(variants)),
            lambda figure: _draw_costs(figure, analysis.slice),
        )
    )
    return figures


def _style(part: Slice, variant: str) -> dict[str, Any]:
    return choose_style(list(part.rows).index(variant))


def _draw_frontier(figure: Figure, part: Slice) -> None:
    panel = figure.subplots()
    for variant, rows in part.rows.items():
        label: str | None = variant
        style = _style(part, variant)
        for size in dict.fromkeys(row.size for row in rows):
            means = _average_seeds([row for row in rows if row.size == size])
            if not means:
                continue
            flops, losses, low, high = zip(*means, strict=True)
            panel.plot(flops, losses, **style, markersize=5, linewidth=1.3, label=label)
            panel.vlines(flops, low, high, color=style["color"], linewidth=1.0)
            label = None
    panel.set_xscale("log")
    panel.set_xlabel("training FLOPs")
    panel.set_ylabel(LOSS_LABEL)
    panel.legend(frameon=False)


def _average_seeds(rows: Sequence[Row]) -> list[tuple[float, float, float, float]]:
    """Return for each budget the FLOPs, and the mean, minimum and maximum loss over seeds."""
    found = []
    for budget in sorted({row.budget for row in rows}):
        finished = [row for row in rows if row.budget == budget and row.loss is not None]
        losses = [row.loss for row in finished if row.loss is not None]
        if losses:
            mean = sum(losses) / len(losses)
            found.append((finished[0].training_flops, mean, min(losses), max(losses)))
    return found


def _draw_gains(figure: Figure, analysis: SliceAnalysis) -> None:
    panels = figure.subplots(1, len(SPENDING), sharey=True)
    for panel, axis in zip(panels, SPENDING, strict=True):
        for comparison in analysis.comparisons:
            known = [gain for gain in comparison.gains.get(axis, ()) if gain.gain is not None]
            if known:
                variant = comparison.candidate
                _draw_gain(panel, known, variant, _style(analysis.slice, variant))
        panel.axhline(1.0, color=INK, linewidth=0.9)
        panel.set_xscale("log")
        panel.set_yscale("log")
        unit = "seconds" if axis == "seconds" else AXIS_NAMES[axis]
        panel.set_xlabel(f"budget of the variant ({unit})")
    baseline = next(iter(analysis.slice.rows))
    panels[0].set_ylabel(f"budget of {baseline} / budget of the variant")
    panels[0].set_ylim(*GAIN_RANGE)
    panels[0].set_yticks(GAIN_TICKS, [f"{tick:g}" for tick in GAIN_TICKS])
    panels[0].yaxis.set_minor_formatter("")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False)


def _draw_gain(panel: Axes, gains: Sequence[Gain], variant: str, style: dict[str, Any]) -> None:
    budgets = [gain.budget for gain in gains]
    values = [gain.gain or np.nan for gain in gains]
    panel.plot(budgets, values, **style, markersize=4, linewidth=1.4, label=variant)
    bands = [(gain.budget, *gain.interval) for gain in gains if gain.interval is not None]
    panel.fill_between(
        [budget for budget, _, _ in bands],
        [low for _, low, _ in bands],
        [high for _, _, high in bands],
        color=style["color"],
        alpha=0.18,
        linewidth=0,
    )


def _draw_costs(figure: Figure, part: Slice) -> None:
    panel = figure.subplots()
    largest = {variant: max(rows, key=lambda row: row.params) for variant, rows in part.rows.items()}
    terms = dict.fromkeys(
        name for row in largest.values() for name, count in row.flops_per_token.items() if count
    )
    positions = list(range(len(largest)))
    left = np.zeros(len(largest))
    for index, term in enumerate(terms):
        widths = np.array([row.flops_per_token.get(term, 0.0) for row in largest.values()])
        panel.barh(
            positions,
            widths,
            left=left,
            color=COLORS[index % len(COLORS)],
            hatch=HATCHES[(index // len(COLORS) * 3 + index) % len(HATCHES)],
            edgecolor="white",
            linewidth=0.6,
            label=term.replace("_", " "),
        )
        left += widths
    panel.set_yticks(positions, list(largest))
    panel.invert_yaxis()
    panel.set_xlabel("training FLOPs per token")
    format_thousands(panel)
    figure.legend(loc="outside right center", frameon=False)
