"""Seed noise: t-intervals of loss differences, and the number of seeds that a test needs.

A cell is one size and one budget, with one run per seed. Cells are fixed effects: an interval holds for the
sizes and budgets that were trained. Only the seeds are random, with one standard deviation for all sizes.

The budgets of one size and seed start with the same weights and samples; as branches of one trunk they share
most of their steps. They are not independent repetitions, so the noise is that of their mean, with one value
per seed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import special

LEVEL, POWER = 0.95, 0.8
# Upper limit of the search for a number of seeds.
MAX_SEEDS = 1000


@dataclass(frozen=True)
class CellDifference:
    """The candidate's loss minus the baseline's in one cell.

    `pairs` holds the difference by seed for the seeds that both have. If they share none it is empty, and
    `candidate` and `baseline` hold the losses of each by seed.
    """

    size: str
    budget: str
    pairs: Mapping[int, float]
    candidate: Mapping[int, float] = field(default_factory=dict)
    baseline: Mapping[int, float] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """The difference of the mean losses over seeds."""
        return _mean(self.pairs) if self.pairs else _mean(self.candidate) - _mean(self.baseline)


@dataclass(frozen=True)
class DifferenceNoise:
    """Standard deviation of the difference between two single seeds, averaged over the budgets of a size.

    `degrees` are its degrees of freedom. `assumed` is True if it was estimated from repeated seeds within one
    variant, as if the runs of a pair were independent.
    """

    deviation: float
    degrees: int
    assumed: bool


@dataclass(frozen=True)
class MeanDifference:
    """The mean difference over cells, its interval and the p-value of a zero difference.

    All fields except `difference` are None without an estimate of the noise; `seeds_needed` is None too if
    more than `MAX_SEEDS` are needed.
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float | None
    noise: DifferenceNoise | None
    seeds_needed: int | None


# One mapping for each budget of a size: seed -> loss or difference.
LossesByBudget = Sequence[Mapping[int, float]]


def estimate_noise(
    cells: Sequence[CellDifference], repetitions: Iterable[LossesByBudget]
) -> DifferenceNoise | None:
    """Estimate the noise from pairs of seeds, or from repetitions if no size has two pairs.

    Args:
        cells: The differences of two variants.
        repetitions: For each variant and size, its losses.
    """
    pooled = pool_deviation(average_budgets([cell.pairs for cell in group]) for group in _by_size(cells))
    if pooled is not None:
        return DifferenceNoise(*pooled, assumed=False)
    pooled = pool_deviation(average_budgets(budgets) for budgets in repetitions)
    return None if pooled is None else DifferenceNoise(math.sqrt(2) * pooled[0], pooled[1], assumed=True)


def pool_deviation(groups: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """Return the standard deviation within groups and its degrees of freedom; None without repetitions."""
    repeated = [group for group in groups if len(group) > 1]
    squares = sum(float(np.var(group)) * len(group) for group in repeated)
    degrees = sum(len(group) - 1 for group in repeated)
    return (math.sqrt(squares / degrees), degrees) if degrees else None


def average_budgets(budgets: LossesByBudget) -> tuple[float, ...]:
    """Return the mean over budgets of each seed that has a budget in common with another seed.

    A missing run is imputed: the seed is assumed to differ from the other seeds there as on its other
    budgets. The result is empty if no budget has two seeds.
    """
    # A single seed on a budget gives no information about differences between seeds.
    repeated = [budget for budget in budgets if len(budget) > 1]
    if not repeated:
        return ()
    seeds = sorted({seed for budget in repeated for seed in budget})
    runs = [
        (row, seeds.index(seed), loss) for row, budget in enumerate(repeated) for seed, loss in budget.items()
    ]
    # Least squares: each loss is the sum of a budget effect and a seed effect.
    design = np.zeros((len(runs), len(repeated) + len(seeds)))
    for number, (row, column, _) in enumerate(runs):
        design[number, [row, len(repeated) + column]] = 1
    effects = np.linalg.lstsq(design, np.array([loss for *_, loss in runs]))[0][len(repeated) :]
    overall = float(np.mean([_mean(budget) for budget in budgets if budget]))
    return tuple((overall + effects - effects.mean()).tolist())


def average_difference(
    cells: Sequence[CellDifference], noise: DifferenceNoise | None, *, num_comparisons: int = 1
) -> MeanDifference:
    """Return the unweighted mean over cells.

    Args:
        cells: At least one cell.
        noise: None gives the mean alone.
        num_comparisons: Comparisons that are tested together; they increase the number of seeds needed.
    """
    difference = float(np.mean([cell.difference for cell in cells]))
    if noise is None:
        return MeanDifference(difference, None, None, None, None)
    by_size = _by_size(cells)
    weights = [len(group) / len(cells) for group in by_size]
    shares = [_variance_share(group) for group in by_size]
    error = noise.deviation * math.sqrt(
        sum(weight**2 * share for weight, share in zip(weights, shares, strict=True))
    )
    half_width = float(special.stdtrit(noise.degrees, (1 + LEVEL) / 2)) * error
    # The deviation at which equally weighted sizes have the same standard error.
    even = noise.deviation * math.sqrt(len(weights) * sum(weight**2 for weight in weights))
    needed = count_seeds_needed(difference, even, len(weights), num_comparisons=num_comparisons)
    interval = (difference - half_width, difference + half_width)
    return MeanDifference(difference, interval, _p_value(difference, error, noise.degrees), noise, needed)


def adjust_p_values(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests by Holm's step-down method (Holm 1979, Scand. J. Stat. 6).

    The smallest of n p-values is multiplied by n, the next by n - 1, and so on; the adjusted values are made
    monotonic. The probability of any false positive is then at most that of a single test.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def count_seeds_needed(
    difference: float, deviation: float, num_sizes: int, *, num_comparisons: int = 1
) -> int | None:
    """Return the smallest number of seeds per size at which a t-test detects `difference` with 80 % power.

    The significance level is 5 %, divided by the number of comparisons (the first step of `adjust_p_values`).
    The result is None if more than `MAX_SEEDS` are needed.
    """
    if difference == 0:
        return None
    level = 1 - (1 - LEVEL) / num_comparisons
    low, high = 1, MAX_SEEDS
    if not _is_detected(difference, deviation, num_sizes, high, level):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if _is_detected(difference, deviation, num_sizes, middle, level):
            high = middle
        else:
            low = middle
    return high


def _is_detected(difference: float, deviation: float, num_sizes: int, seeds: int, level: float) -> bool:
    if deviation == 0:
        return True
    degrees = num_sizes * (seeds - 1)
    shift = abs(difference) * math.sqrt(seeds * num_sizes) / deviation
    critical = float(special.stdtrit(degrees, (1 + level) / 2))
    # Far beyond the critical value the noncentral t lies entirely above it, and is hard to compute.
    return shift > critical + 10 or 1 - float(special.nctdtr(degrees, shift, critical)) >= POWER


def _p_value(difference: float, error: float, degrees: int) -> float:
    if error == 0:
        return float(difference == 0)
    return 2 * float(special.stdtr(degrees, -abs(difference) / error))


def _by_size(cells: Sequence[CellDifference]) -> list[list[CellDifference]]:
    """Group cells by size; cells with and without pairs are separate groups."""
    groups: dict[tuple[str, bool], list[CellDifference]] = {}
    for cell in cells:
        groups.setdefault((cell.size, bool(cell.pairs)), []).append(cell)
    return list(groups.values())


def _variance_share(cells: Sequence[CellDifference]) -> float:
    """Return the variance of a size's mean divided by that of the difference between two single seeds."""
    if cells[0].pairs:
        return _sum_squared_weights([cell.pairs for cell in cells])
    both = ([cell.candidate for cell in cells], [cell.baseline for cell in cells])
    return sum(_sum_squared_weights(budgets) for budgets in both) / 2


def _sum_squared_weights(budgets: Sequence[Collection[int]]) -> float:
    """Return the sum of the squared weights of seeds in the mean over budgets: 1/n for n seeds on each."""
    seeds = {seed for budget in budgets for seed in budget}
    weights = [sum(1 / len(budget) for budget in budgets if seed in budget) / len(budgets) for seed in seeds]
    return sum(weight**2 for weight in weights)


def _mean(by_seed: Mapping[int, float]) -> float:
    return float(np.mean(list(by_seed.values())))


@dataclass(frozen=True)
class SeedNoise:
    """Standard deviation of a final loss over seeds, pooled over cells.

    `degrees` are its degrees of freedom; None if the deviation was given and not measured.
    """

    deviation: float
    degrees: int | None


def smallest_detectable_difference(noise: SeedNoise, *, seeds: tuple[int, int], num_cells: int = 1) -> float:
    """Return the difference of two mean losses that a two-sided test at 5 % detects with 80 % power.

    (t₀.₉₇₅ + t₀.₈) σ √((1/n₁ + 1/n₂)/cells), the usual approximation (Cohen 1988, section 2.5), with the
    degrees of freedom of the noise; a given deviation is treated as exact.

    Args:
        noise: Noise of a single run.
        seeds: n₁ and n₂, the seeds of each variant.
        num_cells: Cells over which the difference is averaged.
    """

    def quantile(probability: float) -> float:
        if noise.degrees is None:
            return float(special.ndtri(probability))
        return float(special.stdtrit(noise.degrees, probability))

    factor = quantile((1 + LEVEL) / 2) + quantile(POWER)
    return factor * noise.deviation * math.sqrt((1 / seeds[0] + 1 / seeds[1]) / num_cells)
