"""The comparison as a figure: validation loss against tokens, training FLOPs and training time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sas_megatron.scaling.comparison import AXES, Axis, Verdict
from sas_megatron.scaling.drawing import COLORS, INK, LINE_STYLES, MARKERS, FileFormat, embed_svg, render
from sas_megatron.scaling.runs import CurvePoint, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES: dict[Axis, str] = {
    "consumed_tokens": "At equal tokens",
    "training_flops": "At equal FLOPs",
    "elapsed_seconds": "At equal time",
}
# Evaluations in the first fifth of training would flatten the rest of the curves.
SETTLED_SHARE = 0.2


def draw_png(runs: Sequence[Run], verdicts: Sequence[Verdict], *, title: str) -> bytes:
    """The three panels side by side, 200 pixels an inch, on white."""
    return _render(runs, verdicts, title=title, stacked=False, file_format="png")


def draw_svg(runs: Sequence[Run], verdicts: Sequence[Verdict], *, stacked: bool) -> str:
    """The same panels as an `<svg>` element to be placed in a page, which gives the title.

    `stacked` puts the panels below each other, for narrow screens. Both forms may stand in one page.
    """
    svg = _render(runs, verdicts, title="", stacked=stacked, file_format="svg").decode()
    return embed_svg(svg, prefix="stacked-" if stacked else "wide-")


def _render(
    runs: Sequence[Run], verdicts: Sequence[Verdict], *, title: str, stacked: bool, file_format: FileFormat
) -> bytes:
    return render(
        lambda figure: _draw(figure, runs, verdicts, title=title, stacked=stacked),
        size=(4.4, 10.6) if stacked else (12.5, 4.7),
        file_format=file_format,
    )


def _draw(
    figure: Figure, runs: Sequence[Run], verdicts: Sequence[Verdict], *, title: str, stacked: bool
) -> None:
    if stacked:
        panels = figure.subplots(3, 1)
    else:
        panels = figure.subplots(1, 3, sharey=True)
        figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    low_high = choose_loss_range(runs)
    for panel, axis in zip(panels, AXES, strict=True):
        budgets = {
            verdict.budget for verdict in verdicts if verdict.axis == axis and verdict.budget is not None
        }
        _draw_panel(panel, runs, axis, budgets)
        if low_high is not None:
            panel.set_ylim(*low_high)
        if stacked or panel is panels[0]:
            panel.set_ylabel("Loss (nats per token)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=_count_legend_columns(labels, 50 if stacked else 165),
        frameon=False,
        handlelength=4.0,
    )


def _draw_panel(panel: Axes, runs: Sequence[Run], axis: Axis, budgets: set[float]) -> None:
    spent = [getattr(point, axis) for run in runs for point in (*run.train_curve, *run.validation_curve)]
    divisor, label = choose_unit(axis, max(spent, default=1.0))
    for index, run in enumerate(runs):
        color = COLORS[index % len(COLORS)]
        every = max(1, len(run.validation_curve) // 8)
        panel.plot(
            *_coordinates(run.train_curve, axis, divisor), color=color, alpha=0.28, linewidth=0.9, zorder=1
        )
        panel.plot(
            *_coordinates(run.validation_curve, axis, divisor),
            color=color,
            linestyle=LINE_STYLES[index % len(LINE_STYLES)],
            linewidth=1.8,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            # Markers on about eight evaluations, the last among them, leave the line style to be seen.
            markevery=((len(run.validation_curve) - 1) % every, every),
            label=f"{run.name}, validation",
            zorder=3,
        )
    # Empty handles, so that the legend explains what the panels have in common.
    panel.plot([], [], color=INK, alpha=0.35, linewidth=0.9, label="faint: training")
    for number, budget in enumerate(sorted(budgets)):
        panel.axvline(
            budget / divisor,
            color=INK,
            alpha=0.55,
            linewidth=1.0,
            linestyle=(0, (1, 2.5)),
            zorder=2,
            label="largest budget both reached" if number == 0 else None,
        )
    panel.set_title(TITLES[axis], loc="left", fontsize=10.5)
    panel.set_xlabel(label)
    panel.set_xlim(left=0)
    panel.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.7)
    panel.locator_params(axis="x", nbins=6)


def choose_loss_range(runs: Sequence[Run]) -> tuple[float, float] | None:
    """Limits that show the settled part of the validation curves; None where nothing was evaluated."""
    known = [
        (run, point, point.loss) for run in runs for point in run.validation_curve if point.loss is not None
    ]
    if not known:
        return None
    settled = [loss for run, point, loss in known if point.step >= SETTLED_SHARE * run.summary.steps]
    losses = settled or [loss for _, _, loss in known]
    low, high = min(losses), max(losses)
    margin = 0.1 * (high - low) or 0.05 * high
    return low - margin, high + margin


def choose_unit(axis: Axis, largest: float) -> tuple[float, str]:
    """What to divide an axis by so that its ticks are short numbers, and the label that says so."""
    if axis == "consumed_tokens":
        sizes = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
        divisor, word = next(((size, word) for size, word in sizes if largest >= size), (1.0, ""))
        return divisor, f"Training tokens ({word})" if word else "Training tokens"
    if axis == "training_flops":
        power = 3 * int(math.log10(largest) // 3) if largest >= 1 else 0
        return (
            10.0**power,
            f"Training compute ($10^{{{power}}}$ FLOPs)" if power else "Training compute (FLOPs)",
        )
    units = ((2 * 86400.0, 86400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (180.0, 60.0, "minutes"))
    divisor, word = next(((unit, word) for floor, unit, word in units if largest >= floor), (1.0, "seconds"))
    return divisor, f"Training time ({word})"


def _count_legend_columns(labels: Sequence[str], characters: int) -> int:
    """One row where it fits in so many characters, otherwise columns as wide as the longest label."""
    # A handle and the space around it take up about twelve characters.
    widths = [len(label) + 12 for label in labels]
    return len(labels) if sum(widths) <= characters else max(1, characters // max(widths))


def _coordinates(curve: Sequence[CurvePoint], axis: Axis, divisor: float) -> tuple[list[float], list[float]]:
    # A missing loss is a gap in the line: NaN is matplotlib's word for it, and stays inside the figure.
    return (
        [getattr(point, axis) / divisor for point in curve],
        [math.nan if point.loss is None else point.loss for point in curve],
    )
