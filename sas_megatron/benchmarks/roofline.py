"""Measurements under this machine's roofline: FLOPs a second against FLOPs a byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sas_megatron.benchmarks.ceilings import Ceilings
from sas_megatron.scaling.drawing import COLORS, MARKERS, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """Something measured, with the least that it must do: FLOPs, and bytes in and out."""

    name: str
    flops: float
    num_bytes: float
    seconds: float


def draw_roofline(points: Sequence[Point], ceilings: Ceilings, *, title: str) -> bytes:
    """A PNG: the roof, each point under it, and by how much it misses the roof above it."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _draw(axes, points, ceilings)
        axes.set_title(title, loc="left", fontsize=10)

    return render(draw, size=(8, 5), file_format="png")


def _draw(axes: Axes, points: Sequence[Point], ceilings: Ceilings) -> None:
    ridge = ceilings.matrix_flops_per_second / ceilings.copied_bytes_per_second
    intensities = [point.flops / point.num_bytes for point in points]
    reach = [min(ridge / 4, *intensities) / 2, ridge, max(ridge * 4, *intensities) * 2]
    roof = [
        min(ceilings.matrix_flops_per_second, at * ceilings.copied_bytes_per_second) / 1e12 for at in reach
    ]
    axes.loglog(reach, roof, color="#5b6570", linewidth=1.5)
    for place, (point, at) in enumerate(zip(points, intensities, strict=True)):
        floor = ceilings.floor_seconds(num_bytes=point.num_bytes, flops=point.flops)
        axes.loglog(
            [at],
            [point.flops / point.seconds / 1e12],
            linestyle="",
            marker=MARKERS[place % len(MARKERS)],
            color=COLORS[place % len(COLORS)],
            label=f"{point.name}: {point.seconds / floor:.2f} × the floor",
        )
    axes.set_xlabel("FLOPs a byte, the least of both")
    axes.set_ylabel("TFLOP/s")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(frameon=False, loc="lower right")
