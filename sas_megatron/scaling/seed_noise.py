"""Is a difference of two variants more than the noise of seeds? A t-interval, and the seeds that would tell.

Differences are of cells: a size on a budget, one run for each seed. Cells are taken as they are, so an
interval speaks of the sizes and budgets that were tried; only seeds are random, with one spread in all cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL, POWER = 0.95, 0.8
# Beyond so many seeds nobody will look.
MOST_SEEDS = 1000


@dataclass(frozen=True)
class CellDifference:
    """One cell: the candidate's loss less the baseline's.

    `pairs` has a difference for each seed that both have. Where they share none it is empty, and `candidate`
    and `baseline` are the losses of each.
    """

    size: str
    budget: str
    pairs: tuple[float, ...]
    candidate: tuple[float, ...] = ()
    baseline: tuple[float, ...] = ()

    @property
    def difference(self) -> float:
        """The mean over seeds."""
        return float(np.mean(self.pairs) if self.pairs else np.mean(self.candidate) - np.mean(self.baseline))

    @property
    def variance_share(self) -> float:
        """The variance of `difference`, over that of the difference of two single runs."""
        if self.pairs:
            return 1 / len(self.pairs)
        return (1 / len(self.candidate) + 1 / len(self.baseline)) / 2


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the difference of two single runs, and its degrees of freedom.

    `assumed`: of seeds of the same variant elsewhere, as if runs of a pair were independent.
    """

    deviation: float
    degrees: int
    assumed: bool


@dataclass(frozen=True)
class MeanDifference:
    """The mean over cells with its interval; both None where nothing says how large the noise is."""

    difference: float
    interval: tuple[float, float] | None
    noise: Noise | None
    seeds_that_would_tell: int | None


def estimate_noise(cells: Sequence[CellDifference], repeats: Sequence[Sequence[float]]) -> Noise | None:
    """From pairs where a cell has two or more, otherwise from `repeats`: losses of a variant in a cell."""
    pooled = _pool([cell.pairs for cell in cells])
    if pooled is not None:
        return Noise(*pooled, assumed=False)
    pooled = _pool(repeats)
    return None if pooled is None else Noise(math.sqrt(2) * pooled[0], pooled[1], assumed=True)


def average_difference(cells: Sequence[CellDifference], noise: Noise | None) -> MeanDifference:
    """The mean over the cells, each weighing alike."""
    difference = float(np.mean([cell.difference for cell in cells]))
    if noise is None:
        return MeanDifference(difference, None, None, None)
    error = noise.deviation * math.sqrt(sum(cell.variance_share for cell in cells)) / len(cells)
    reach = float(special.stdtrit(noise.degrees, (1 + LEVEL) / 2)) * error
    needed = count_seeds_that_tell(difference, noise.deviation, len(cells))
    return MeanDifference(difference, (difference - reach, difference + reach), noise, needed)


def count_seeds_that_tell(difference: float, deviation: float, num_cells: int) -> int | None:
    """Fewest seeds in each cell by which a t-test at 95 % finds `difference` in 80 % of studies.

    None: more than `MOST_SEEDS`.
    """
    if difference == 0:
        return None
    low, high = 1, MOST_SEEDS
    if not _tells(difference, deviation, num_cells, high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if _tells(difference, deviation, num_cells, middle):
            high = middle
        else:
            low = middle
    return high


def _tells(difference: float, deviation: float, num_cells: int, seeds: int) -> bool:
    if deviation == 0:
        return True
    degrees = num_cells * (seeds - 1)
    shift = abs(difference) * math.sqrt(seeds * num_cells) / deviation
    critical = float(special.stdtrit(degrees, (1 + LEVEL) / 2))
    # Far beyond the critical value the noncentral t is all above it, and hard to compute.
    return shift > critical + 10 or 1 - float(special.nctdtr(degrees, shift, critical)) >= POWER


def _pool(groups: Sequence[Sequence[float]]) -> tuple[float, int] | None:
    """Standard deviation within groups and its degrees of freedom; None where no group has two."""
    squares = sum(float(np.var(group)) * len(group) for group in groups if len(group) > 1)
    degrees = sum(len(group) - 1 for group in groups if len(group) > 1)
    return (math.sqrt(squares / degrees), degrees) if degrees else None
