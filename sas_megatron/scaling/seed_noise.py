"""Is a difference of two variants more than the noise of seeds? A t-interval, and the seeds that would tell.

Differences are of cells: a size on a budget, one run for each seed. Cells are taken as they are, so an
interval speaks of the sizes and budgets that were tried; only seeds are random, with one spread in all sizes.

The budgets of one size and seed begin with the same weights and samples, and as branches of one trunk share
most of their steps. They are no repeats of each other: noise is of their mean, one number for each seed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import special

LEVEL, POWER = 0.95, 0.8
# Beyond so many seeds nobody will look.
MOST_SEEDS = 1000


@dataclass(frozen=True)
class CellDifference:
    """One cell: the candidate's loss less the baseline's.

    `pairs` has a difference for each seed that both have. Where they share none it is empty, and `candidate`
    and `baseline` are the losses of each by seed.
    """

    size: str
    budget: str
    pairs: Mapping[int, float]
    candidate: Mapping[int, float] = field(default_factory=dict)
    baseline: Mapping[int, float] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """The mean over seeds."""
        return _mean(self.pairs) if self.pairs else _mean(self.candidate) - _mean(self.baseline)


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the difference of two single seeds, in the mean over a size's budgets.

    `degrees` are its degrees of freedom. `assumed`: of seeds of the same variant elsewhere, as if runs of a
    pair were independent.
    """

    deviation: float
    degrees: int
    assumed: bool


@dataclass(frozen=True)
class MeanDifference:
    """The mean over cells with its interval and the p-value of its being zero.

    All but the mean are None where nothing says how large the noise is.
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float | None
    noise: Noise | None
    seeds_that_would_tell: int | None


# By budget, what one size has by seed.
Budgets = Sequence[Mapping[int, float]]


def estimate_noise(cells: Sequence[CellDifference], repeats: Iterable[Budgets]) -> Noise | None:
    """From pairs where a size has two or more, otherwise from `repeats`: losses of a variant at a size."""
    pooled = pool_deviation(average_budgets([cell.pairs for cell in own]) for own in _by_size(cells))
    if pooled is not None:
        return Noise(*pooled, assumed=False)
    pooled = pool_deviation(average_budgets(budgets) for budgets in repeats)
    return None if pooled is None else Noise(math.sqrt(2) * pooled[0], pooled[1], assumed=True)


def pool_deviation(groups: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """Standard deviation within groups and its degrees of freedom; None where no group has two."""
    repeated = [group for group in groups if len(group) > 1]
    squares = sum(float(np.var(group)) * len(group) for group in repeated)
    degrees = sum(len(group) - 1 for group in repeated)
    return (math.sqrt(squares / degrees), degrees) if degrees else None


def average_budgets(budgets: Budgets) -> tuple[float, ...]:
    """The mean over budgets of each seed that shares one with another seed; without any, nothing.

    A budget that a seed lacks counts as if the seed stood there to the others as it does elsewhere.
    """
    # A seed that is alone on a budget says nothing there of how it stands to others.
    told = [budget for budget in budgets if len(budget) > 1]
    if not told:
        return ()
    seeds = sorted({seed for budget in told for seed in budget})
    runs = [
        (row, seeds.index(seed), loss) for row, budget in enumerate(told) for seed, loss in budget.items()
    ]
    # By least squares, each a sum of what its budget and its seed add.
    sums = np.zeros((len(runs), len(told) + len(seeds)))
    for number, (row, column, _) in enumerate(runs):
        sums[number, [row, len(told) + column]] = 1
    parts = np.linalg.lstsq(sums, np.array([loss for *_, loss in runs]))[0][len(told) :]
    overall = float(np.mean([_mean(budget) for budget in budgets if budget]))
    return tuple((overall + parts - parts.mean()).tolist())


def average_difference(
    cells: Sequence[CellDifference], noise: Noise | None, *, comparisons: int = 1
) -> MeanDifference:
    """The mean over the cells, each weighing alike; with several comparisons it takes more seeds to tell."""
    difference = float(np.mean([cell.difference for cell in cells]))
    if noise is None:
        return MeanDifference(difference, None, None, None, None)
    by_size = _by_size(cells)
    weights = [len(own) / len(cells) for own in by_size]
    shares = [_variance_share(own) for own in by_size]
    error = noise.deviation * math.sqrt(
        sum(weight**2 * share for weight, share in zip(weights, shares, strict=True))
    )
    reach = float(special.stdtrit(noise.degrees, (1 + LEVEL) / 2)) * error
    # As if all sizes weighed alike, with as large an error.
    even = noise.deviation * math.sqrt(len(weights) * sum(weight**2 for weight in weights))
    needed = count_seeds_that_tell(difference, even, len(weights), comparisons=comparisons)
    interval = (difference - reach, difference + reach)
    return MeanDifference(difference, interval, _p_value(difference, error, noise.degrees), noise, needed)


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Of several tests, so that any false one among them is as rare as in a single test (Holm 1979).

    Scand. J. Stat. 6: the smallest counts as many times as there are tests, the next one time less, and none
    less than the one before.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def count_seeds_that_tell(
    difference: float, deviation: float, num_sizes: int, *, comparisons: int = 1
) -> int | None:
    """Fewest seeds of each size by which a t-test finds `difference` in 80 % of studies.

    The test is at 95 %; as one of several comparisons it is at the first step of `adjust_p_values`. None:
    more than `MOST_SEEDS`.
    """
    if difference == 0:
        return None
    level = 1 - (1 - LEVEL) / comparisons
    low, high = 1, MOST_SEEDS
    if not _tells(difference, deviation, num_sizes, high, level):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if _tells(difference, deviation, num_sizes, middle, level):
            high = middle
        else:
            low = middle
    return high


def _tells(difference: float, deviation: float, num_sizes: int, seeds: int, level: float) -> bool:
    if deviation == 0:
        return True
    degrees = num_sizes * (seeds - 1)
    shift = abs(difference) * math.sqrt(seeds * num_sizes) / deviation
    critical = float(special.stdtrit(degrees, (1 + level) / 2))
    # Far beyond the critical value the noncentral t is all above it, and hard to compute.
    return shift > critical + 10 or 1 - float(special.nctdtr(degrees, shift, critical)) >= POWER


def _p_value(difference: float, error: float, degrees: int) -> float:
    if error == 0:
        return float(difference == 0)
    return 2 * float(special.stdtr(degrees, -abs(difference) / error))


def _by_size(cells: Sequence[CellDifference]) -> list[list[CellDifference]]:
    """Cells of one size together, those with pairs apart from those without."""
    groups: dict[tuple[str, bool], list[CellDifference]] = {}
    for cell in cells:
        groups.setdefault((cell.size, bool(cell.pairs)), []).append(cell)
    return list(groups.values())


def _variance_share(cells: Sequence[CellDifference]) -> float:
    """Of a size's mean: its variance, over that of the difference of two single seeds."""
    if cells[0].pairs:
        return _weight_of_seeds([cell.pairs for cell in cells])
    both = ([cell.candidate for cell in cells], [cell.baseline for cell in cells])
    return sum(_weight_of_seeds(budgets) for budgets in both) / 2


def _weight_of_seeds(budgets: Sequence[Collection[int]]) -> float:
    """The sum of squares of the seeds' weights in the mean over budgets: 1/n for n seeds on each."""
    seeds = {seed for budget in budgets for seed in budget}
    weights = [sum(1 / len(budget) for budget in budgets if seed in budget) / len(budgets) for seed in seeds]
    return sum(weight**2 for weight in weights)


def _mean(by_seed: Mapping[int, float]) -> float:
    return float(np.mean(list(by_seed.values())))
