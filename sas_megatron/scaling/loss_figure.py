"""Loss curves of several runs in three panels: against tokens, training FLOPs and training time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sas_megatron.scaling.drawing import INK, choose_style
from sas_megatron.scaling.outcomes import Axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS: dict[Axis, str] = {
    "tokens": "At equal tokens",
    "flops": "At equal FLOPs",
    "seconds": "At equal time",
}
# The first fifth of training is left out of the limits: its high losses would flatten the rest of the curves.
SETTLED_FRACTION = 0.2


@dataclass(frozen=True)
class CurveData:
    """A curve to draw: its losses (NaN if missing) and the amounts spent on each axis.

    `index` selects colour, marker and line style.
    """

    label: str
    index: int
    spent: Mapping[Axis, Sequence[float]]
    losses: Sequence[float]


def draw_loss_curves(
    figure: Figure,
    curves: Sequence[CurveData],
    *,
    train_curves: Sequence[CurveData] = (),
    budgets: Mapping[Axis, Collection[float]] | None = None,
) -> None:
    """Draw validation curves, optionally with faint training curves and dotted lines at budgets."""
    panels = figure.subplots(1, len(PANELS), sharey=True)
    limits = choose_loss_range(curves)
    for panel, axis in zip(panels, PANELS, strict=True):
        _draw_panel(panel, axis, curves, train_curves, sorted((budgets or {}).get(axis, ())))
        if limits is not None:
            panel.set_ylim(*limits)
    panels[0].set_ylabel("Loss (nats per token)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=_count_legend_columns(labels, 165),
        frameon=False,
        handlelength=4.0,
    )


def _draw_panel(
    panel: Axes,
    axis: Axis,
    curves: Sequence[CurveData],
    train_curves: Sequence[CurveData],
    budgets: Sequence[float],
) -> None:
    spent = [value for curve in (*curves, *train_curves) for value in curve.spent[axis]]
    divisor, label = choose_unit(axis, max(spent, default=1.0))
    for curve in train_curves:
        x = [value / divisor for value in curve.spent[axis]]
        color = choose_style(curve.index)["color"]
        panel.plot(x, curve.losses, color=color, alpha=0.28, linewidth=0.9, zorder=1)
    for curve in curves:
        every = max(1, len(curve.losses) // 8)
        panel.plot(
            [value / divisor for value in curve.spent[axis]],
            curve.losses,
            **choose_style(curve.index),
            linewidth=1.8,
            markersize=5,
            # About eight markers, including the last evaluation, keep the line style visible.
            markevery=((len(curve.losses) - 1) % every, every),
            label=curve.label,
            zorder=3,
        )
    if train_curves:
        # An empty handle, so that the legend explains the faint lines once.
        panel.plot([], [], color=INK, alpha=0.35, linewidth=0.9, label="faint: training")
    for number, budget in enumerate(budgets):
        panel.axvline(
            budget / divisor,
            color=INK,
            alpha=0.55,
            linewidth=1.0,
            linestyle=(0, (1, 2.5)),
            zorder=2,
            label="largest budget both reached" if number == 0 else None,
        )
    panel.set_title(PANELS[axis], loc="left", fontsize=10.5)
    panel.set_xlabel(label)
    panel.set_xlim(left=0)
    panel.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.7)
    panel.locator_params(axis="x", nbins=6)


def choose_loss_range(curves: Sequence[CurveData]) -> tuple[float, float] | None:
    """Return limits that contain the settled part of the curves; None without any loss."""
    known = [
        (loss, tokens >= SETTLED_FRACTION * curve.spent["tokens"][-1])
        for curve in curves
        for tokens, loss in zip(curve.spent["tokens"], curve.losses, strict=True)
        if not math.isnan(loss)
    ]
    if not known:
        return None
    losses = [loss for loss, is_settled in known if is_settled] or [loss for loss, _ in known]
    low, high = min(losses), max(losses)
    margin = 0.1 * (high - low) or 0.05 * high
    return low - margin, high + margin


def choose_unit(axis: Axis, largest: float) -> tuple[float, str]:
    """Return a divisor that makes the ticks of an axis short numbers, and the label with that unit."""
    if axis == "tokens":
        sizes = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
        divisor, word = next(((size, word) for size, word in sizes if largest >= size), (1.0, ""))
        return divisor, f"Training tokens ({word})" if word else "Training tokens"
    if axis == "flops":
        power = 3 * int(math.log10(largest) // 3) if largest >= 1 else 0
        return (
            10.0**power,
            f"Training compute ($10^{{{power}}}$ FLOPs)" if power else "Training compute (FLOPs)",
        )
    units = ((2 * 86400.0, 86400.0, "days"), (2 * 3600.0, 3600.0, "hours"), (180.0, 60.0, "minutes"))
    divisor, word = next(((unit, word) for floor, unit, word in units if largest >= floor), (1.0, "seconds"))
    return divisor, f"Training time ({word})"


def _count_legend_columns(labels: Sequence[str], characters: int) -> int:
    """Return the number of columns: one row if it fits, else columns as wide as the longest label."""
    # A handle and the space around it are about twelve characters wide.
    widths = [len(label) + 12 for label in labels]
    return len(labels) if sum(widths) <= characters else max(1, characters // max(widths))
