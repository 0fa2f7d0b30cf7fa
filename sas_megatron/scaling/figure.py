"""The comparison as a figure: validation loss against tokens, training FLOPs and training time."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sas_megatron.scaling.comparison import AXES, Axis, Verdict
from sas_megatron.scaling.runs import CurvePoint, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; line style and marker repeat
# the distinction for a print in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINE_STYLES = ("-", "--", "-.", ":", (0, (6, 2, 1, 2, 1, 2)))
INK = "#1b1f24"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # The same runs give the same bytes.
    "svg.hashsalt": "sas_megatron",
}
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

    Its background is the page's and its ink the page's `currentColor`. `stacked` puts the panels
    below each other, for narrow screens. Both forms may stand in one page: their ids differ.
    """
    svg = _render(runs, verdicts, title="", stacked=stacked, file_format="svg").decode()
    svg = svg[svg.index("<svg") :]
    prefix = "stacked-" if stacked else "wide-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor").strip()


def _render(
    runs: Sequence[Run], verdicts: Sequence[Verdict], *, title: str, stacked: bool, file_format: str
) -> bytes:
    # Figure with its own canvas, not pyplot: no global state, no window system.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(4.4, 10.6) if stacked else (12.5, 4.7), layout=ConstrainedLayoutEngine(wspace=0.05)
        )
        FigureCanvasAgg(figure)
        _draw(figure, runs, verdicts, title=title, stacked=stacked)
        if file_format == "svg":
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
        else:
            figure.savefig(buffer, format=file_format, dpi=200, facecolor="white")
    return buffer.getvalue()


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
