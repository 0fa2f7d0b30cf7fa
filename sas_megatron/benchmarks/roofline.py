"""Measured ceilings of this machine, and a plot of measurements under the roofline that they form.

The ceilings are the bandwidth of a large copy and the FLOP rate of a large matrix product. The plot shows
FLOPs per second against FLOPs per byte.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sas_megatron.benchmarks.timing import time_alternately
from sas_megatron.scaling.drawing import COLORS, MARKERS, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The copy is several times larger than the caches, and the product is large enough to fill the device.
COPIED_BYTES = {"cuda": 2**32, "cpu": 2**27}
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Ceilings:
    """Bytes read and written per second, and FLOPs per second in the benchmark's precision."""

    copied_bytes_per_second: float
    matrix_flops_per_second: float

    def floor_seconds(self, *, num_bytes: float, flops: float) -> float:
        """Return the least possible time: the larger of memory time and compute time."""
        return max(num_bytes / self.copied_bytes_per_second, flops / self.matrix_flops_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, rounds: int = 7) -> Ceilings:
    """Measure a large copy, and a large square matrix product of random numbers (zeros can be faster)."""
    source = torch.empty(COPIED_BYTES[device.type], dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    side = PRODUCT_SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = time_alternately(
        {
            "copy": lambda: lambda: target.copy_(source),
            "product": lambda: lambda: torch.mm(left, right, out=product),
        },
        device=device,
        rounds=rounds,
    )
    return Ceilings(
        2 * source.numel() / statistics.median(seconds["copy"]),
        2 * side**3 / statistics.median(seconds["product"]),
    )


@dataclass(frozen=True)
class Point:
    """A measured time, with the least FLOPs and the least bytes read and written of the computation."""

    name: str
    flops: float
    num_bytes: float
    seconds: float


def draw_roofline(points: Sequence[Point], ceilings: Ceilings, *, title: str) -> bytes:
    """Return a PNG of the roofline and the points; the legend gives each point's time over its least time."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _draw_axes(axes, points, ceilings)
        axes.set_title(title, loc="left", fontsize=10)

    return render(draw, size=(8, 5), file_format="png")


def _draw_axes(axes: Axes, points: Sequence[Point], ceilings: Ceilings) -> None:
    ridge = ceilings.matrix_flops_per_second / ceilings.copied_bytes_per_second
    intensities = [point.flops / point.num_bytes for point in points]
    roof_intensities = [min(ridge / 4, *intensities) / 2, ridge, max(ridge * 4, *intensities) * 2]
    roof = [
        min(ceilings.matrix_flops_per_second, intensity * ceilings.copied_bytes_per_second) / 1e12
        for intensity in roof_intensities
    ]
    axes.loglog(roof_intensities, roof, color="#5b6570", linewidth=1.5)
    for index, (point, intensity) in enumerate(zip(points, intensities, strict=True)):
        floor = ceilings.floor_seconds(num_bytes=point.num_bytes, flops=point.flops)
        axes.loglog(
            [intensity],
            [point.flops / point.seconds / 1e12],
            linestyle="",
            marker=MARKERS[index % len(MARKERS)],
            color=COLORS[index % len(COLORS)],
            label=f"{point.name}: {point.seconds / floor:.2f} × the floor",
        )
    axes.set_xlabel("least FLOPs per least byte")
    axes.set_ylabel("TFLOP/s")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(frameon=False, loc="lower right")
