"""Tests of differences: intervals, p-values, their adjustment, and the seeds that a test needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

LEVEL, POWER = 0.95, 0.8
# Upper limit of the search for a number of seeds.
MAX_SEEDS = 1000

# An estimated variance and its degrees of freedom.
Part = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A difference of losses with its 95 % interval and the p-value of a zero difference.

    The fields other than `difference` are None without an estimate of the noise. `error` is the standard
    error, and `deviation` the standard deviation of the difference between two single seeds.
    """

    difference: float
    error: float | None = None
    degrees: float | None = None
    deviation: float | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None

    @staticmethod
    def of(difference: float, error: float, degrees: float, deviation: float | None = None) -> Estimate:
        """Build the interval and the p-value from the standard error and its degrees of freedom."""
        half_width = float(special.stdtrit(degrees, (1 + LEVEL) / 2)) * error
        interval = (difference - half_width, difference + half_width)
        if error == 0:
            p_value = float(difference == 0)
        else:
            p_value = 2 * float(special.stdtr(degrees, -abs(difference) / error))
        return Estimate(difference, error, degrees, deviation, interval, p_value)


def add_variances(parts: Sequence[Part]) -> Part:
    """Return the sum of independent variances and its effective degrees of freedom (Satterthwaite 1946)."""
    total = sum(variance for variance, _ in parts)
    if total == 0:
        return 0.0, max(degrees for _, degrees in parts)
    return total, total**2 / sum(variance**2 / degrees for variance, degrees in parts)


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
    difference: float, deviation: float, num_variants: int = 2, *, num_comparisons: int = 1
) -> int | None:
    """Return the smallest number of seeds of each variant with which a t-test has a power of 80 %.

    The significance level is 5 %, divided by the number of comparisons (the first step of `adjust_p_values`).
    The result is None if more than `MAX_SEEDS` are needed.

    Args:
        difference: The true difference.
        deviation: Standard deviation of the difference between two single seeds.
        num_variants: Variants with this number of seeds, over which the noise is pooled.
        num_comparisons: Comparisons that are tested together.
    """
    if difference == 0:
        return None
    level = 1 - (1 - LEVEL) / num_comparisons
    low, high = 1, MAX_SEEDS

    def is_detected(seeds: int) -> bool:
        if deviation == 0:
            return True
        degrees = (num_variants - 1) * (seeds - 1)
        shift = abs(difference) * math.sqrt(seeds) / deviation
        critical = float(special.stdtrit(degrees, (1 + level) / 2))
        # Far beyond the critical value the noncentral t lies entirely above it, and is hard to compute.
        return shift > critical + 10 or 1 - float(special.nctdtr(degrees, shift, critical)) >= POWER

    if not is_detected(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_detected(middle) else (middle, high)
    return high


def smallest_detectable_difference(
    deviation: float, degrees: float | None, *, seeds: tuple[int, int]
) -> float:
    """Return the difference of two mean losses that a two-sided test at 5 % detects with 80 % power.

    (t₀.₉₇₅ + t₀.₈) σ √(1/n₁ + 1/n₂), the usual approximation (Cohen 1988, section 2.5).

    Args:
        deviation: σ, the standard deviation of a single seed.
        degrees: Its degrees of freedom; None if it was given and not measured.
        seeds: n₁ and n₂, the seeds of each variant.
    """
    probabilities = np.array([(1 + LEVEL) / 2, POWER])
    quantiles = special.ndtri(probabilities) if degrees is None else special.stdtrit(degrees, probabilities)
    return float(quantiles.sum()) * deviation * math.sqrt(1 / seeds[0] + 1 / seeds[1])
