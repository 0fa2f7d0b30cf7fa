"""Figures of the evidence behind verdicts: differences by budget, learning curves and rate sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sas_megatron.scaling.comparison import Comparison
from sas_megatron.scaling.drawing import INK, choose_style
from sas_megatron.scaling.loss_figure import CurveData, choose_loss_range
from sas_megatron.scaling.outcomes import Axis
from sas_megatron.scaling.report import ReportFigure
from sas_megatron.scaling.significance import Estimate
from sas_megatron.scaling.study.analysis import Slice, SliceAnalysis
from sas_megatron.scaling.study.grids import group_axes, name_axes
from sas_megatron.scaling.study.law_figures import LOSS_LABEL, format_thousands
from sas_megatron.scaling.study.study_table import SweepCell, SweepRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Panels in a row.
COLUMNS = 3
# Distance of the points of two axes at one budget, as a share of the distance of two budgets.
SHIFT = 0.09


def difference_figure(analyses: Sequence[SliceAnalysis]) -> ReportFigure | None:
    """Return the figure of the differences by budget, or by variant in a study of one budget.

    There is a panel for each variant and slice, or for each slice.
    """
    compared = [analysis for analysis in analyses if analysis.comparisons]
    if not compared:
        return None
    budgets = {row.budget for analysis in compared for rows in analysis.slice.rows.values() for row in rows}
    by_budget = len(budgets) > 1
    panels = [
        _Panel(analysis, chosen, by_budget=by_budget)
        for analysis in compared
        for chosen in (
            [[comparison] for comparison in analysis.comparisons] if by_budget else [analysis.comparisons]
        )
    ]
    abscissa = "budget" if by_budget else "variant"
    return ReportFigure(
        "differences",
        f"Difference against {abscissa}",
        f"Loss of each variant minus that of {compared[0].comparisons[0].baseline} by {abscissa}, a line for "
        "each quantity that is equal, with 95 % intervals of each point alone. Below zero the variant is "
        "better.",
        _choose_size(len(panels)),
        lambda figure: _draw_differences(figure, panels),
    )


@dataclass(frozen=True)
class _Panel:
    """The comparisons of a panel of differences: of one variant by budget, or of several variants."""

    analysis: SliceAnalysis
    comparisons: Sequence[Comparison]
    by_budget: bool

    def points(self, axis: Axis) -> list[tuple[str, Estimate]]:
        """Return the estimates on an axis by budget or by variant."""
        return [
            (part.budget if self.by_budget else comparison.candidate, part.estimate)
            for comparison in self.comparisons
            for part in comparison.verdict(axis).by_budget
        ]

    @property
    def ticks(self) -> list[str]:
        """The budgets or the variants, in order."""
        if not self.by_budget:
            return [comparison.candidate for comparison in self.comparisons]
        budgets = {row.budget for rows in self.analysis.slice.rows.values() for row in rows}
        return [f"{budget:g}" for budget in sorted(budgets)]

    @property
    def title(self) -> str:
        """The variant, if there is one, and the slice."""
        variant = self.comparisons[0].candidate if self.by_budget else ""
        return ", ".join(filter(None, (variant, self.analysis.slice.name)))


def curve_figure(part: Slice) -> ReportFigure:
    """Return the figure of the learning curves of all sizes."""
    sizes = list(dict.fromkeys(row.size for rows in part.rows.values() for row in rows))
    return ReportFigure(
        "curves",
        "Learning curves of all sizes",
        "Validation loss against tokens at each size, for the largest budget of each variant; mean over "
        "seeds.",
        _choose_size(len(sizes)),
        lambda figure: _draw_curves(figure, part, sizes),
    )


def sweep_figure(part: Slice, sweeps: Sequence[SweepRun]) -> ReportFigure | None:
    """Return the figure of the learning rate sweeps; None without any."""
    cells = list(dict.fromkeys(run.cell for run in sweeps))
    if not cells:
        return None
    return ReportFigure(
        "sweeps",
        "Learning rate sweeps",
        "Final loss against the peak learning rate in the sweeps (one seed). A vertical "
        "line marks the rate with which the variant was trained.",
        (min(12.5, 1.0 + 4.4 * len(cells)), 4.2),
        lambda figure: _draw_sweeps(figure, part, sweeps, cells),
    )


def _choose_size(count: int) -> tuple[float, float]:
    """Return the size in inches of a figure of `count` panels."""
    columns, rows = _arrange(count)
    return max(6.0, 1.0 + 3.8 * columns), 0.8 + 3.2 * rows


def _arrange(count: int) -> tuple[int, int]:
    """Return the columns and rows of panels."""
    columns = min(count, COLUMNS)
    return columns, math.ceil(count / columns)


def _grid_of_panels(figure: Figure, count: int) -> list[Axes]:
    """Return `count` panels in rows of at most `COLUMNS`, with a shared vertical axis."""
    columns, rows = _arrange(count)
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    for unused in panels[count:]:
        unused.set_visible(False)
    return list(panels[:count])


def _draw_differences(figure: Figure, panels: Sequence[_Panel]) -> None:
    drawn = _grid_of_panels(figure, len(panels))
    for number, (axes, panel) in enumerate(zip(drawn, panels, strict=True)):
        groups = group_axes(panel.analysis.comparisons)
        for line, group in enumerate(groups):
            points = panel.points(group[0])
            if not points:
                continue
            shift = SHIFT * (line - (len(groups) - 1) / 2)
            x = [panel.ticks.index(tick) + shift for tick, _ in points]
            y = [estimate.difference for _, estimate in points]
            ends = [estimate.interval or (estimate.difference,) * 2 for _, estimate in points]
            style = choose_style(line) | ({} if panel.by_budget else {"linestyle": ""})
            axes.plot(x, y, **style, markersize=4.5, linewidth=1.3, label=name_axes(group))
            axes.vlines(x, *zip(*ends, strict=True), color=style["color"], linewidth=1.1)
        axes.axhline(0.0, color=INK, linewidth=0.9)
        axes.set_xticks(range(len(panel.ticks)), panel.ticks)
        if not panel.by_budget:
            axes.tick_params(axis="x", rotation=30)
        axes.set_xlim(-0.5, len(panel.ticks) - 0.5)
        axes.set_title(panel.title, loc="left", fontsize=10.5)
        if panel.by_budget:
            axes.set_xlabel("budget")
        if number % COLUMNS == 0:
            axes.set_ylabel(f"loss − loss of {panel.comparisons[0].baseline}")
    _add_legend(figure, drawn)


def _add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Add one legend below the panels, with each label once."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(6, max(1, len(handles))),
        frameon=False,
        handlelength=3.5,
    )


def _draw_curves(figure: Figure, part: Slice, sizes: Sequence[str]) -> None:
    by_size = {size: build_mean_curves(part, size) for size in sizes}
    panels = _grid_of_panels(figure, len(sizes))
    for number, (panel, (size, curves)) in enumerate(zip(panels, by_size.items(), strict=True)):
        for curve in curves:
            style = {**choose_style(curve.index), "marker": ""}
            panel.plot(curve.spent["tokens"], curve.losses, **style, linewidth=1.4, label=curve.label)
        panel.set_title(size, loc="left", fontsize=10.5)
        panel.set_xlabel("tokens")
        if number % COLUMNS == 0:
            panel.set_ylabel(LOSS_LABEL)
        format_thousands(panel)
    limits = choose_loss_range([curve for curves in by_size.values() for curve in curves])
    if limits is not None:
        panels[0].set_ylim(*limits)
    _add_legend(figure, panels)


def build_mean_curves(part: Slice, size: str) -> list[CurveData]:
    """Return for each variant the mean validation curve over seeds of a size at its largest budget."""
    curves = []
    for index, (variant, rows) in enumerate(part.rows.items()):
        done = [row for row in rows if row.size == size and row.curve_loss]
        if not done:
            continue
        longest = max(done, key=lambda row: row.budget)
        seeds = [
            row for row in done if row.budget == longest.budget and row.curve_steps == longest.curve_steps
        ]
        losses = np.array([row.curve_loss for row in seeds], dtype=float).mean(axis=0)
        tokens: dict[Axis, list[float]] = {"tokens": [float(count) for count in longest.curve_tokens]}
        curves.append(CurveData(variant, index, tokens, losses.tolist()))
    return curves


def _draw_sweeps(figure: Figure, part: Slice, sweeps: Sequence[SweepRun], cells: Sequence[SweepCell]) -> None:
    panels = np.atleast_1d(figure.subplots(1, len(cells), sharey=True))
    sizes = [size for size, _, _ in cells]
    for panel, cell in zip(panels, cells, strict=True):
        size, budget, _ = cell
        for index, (variant, rows) in enumerate(part.rows.items()):
            runs = sorted(
                (run.learning_rate, run.loss)
                for run in sweeps
                if (run.variant, run.cell) == (variant, cell) and run.loss is not None
            )
            if not runs:
                continue
            style = choose_style(index)
            panel.plot(*zip(*runs, strict=True), **style, markersize=4.5, linewidth=1.3, label=variant)
            for rate in {row.learning_rate for row in rows if row.size == size}:
                panel.axvline(rate, color=style["color"], linestyle=style["linestyle"], linewidth=0.9)
        panel.set_xscale("log")
        title = size if sizes.count(size) == 1 or budget is None else f"{size}, budget {budget:g}"
        panel.set_title(title, loc="left", fontsize=10.5)
        panel.set_xlabel("peak learning rate")
    panels[0].set_ylabel(LOSS_LABEL)
    _add_legend(figure, list(panels))
