"""What a study can tell apart: the smallest difference of losses that its seeds would show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

SIGNIFICANCE = 0.05
POWER = 0.8


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of a final loss over seeds, pooled over cells of equal runs.

    `degrees` is None where it was stated and not measured.
    """

    deviation: float
    degrees: int | None


def measure_seed_noise(cells: Iterable[Sequence[float]]) -> SeedNoise | None:
    """From the losses of runs that differ in their seed alone, a cell each; None without two in any."""
    repeated = [cell for cell in cells if len(cell) > 1]
    degrees = sum(len(cell) - 1 for cell in repeated)
    if not degrees:
        return None
    squares = sum((loss - sum(cell) / len(cell)) ** 2 for cell in repeated for loss in cell)
    return SeedNoise(math.sqrt(squares / degrees), degrees)


def smallest_effect(noise: SeedNoise, *, seeds: tuple[int, int], cells: int = 1) -> float:
    """The difference of two variants' mean losses that a two-sided test at 5 % finds four times of five.

    (t₀.₉₇₅ + t₀.₈) σ √((1/n₁ + 1/n₂)/cells), the usual approximation (Cohen 1988, section 2.5), with the
    degrees of freedom of the noise; a stated deviation counts as known.

    Args:
        noise: Of one run.
        seeds: n₁ and n₂, of each variant.
        cells: Sizes and budgets that the difference is averaged over.
    """
    from scipy import stats

    quantile = stats.norm.ppf if noise.degrees is None else stats.t(noise.degrees).ppf
    factor = quantile(1 - SIGNIFICANCE / 2) + quantile(POWER)
    return float(factor * noise.deviation * math.sqrt((1 / seeds[0] + 1 / seeds[1]) / cells))
