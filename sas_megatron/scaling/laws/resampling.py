"""Bootstrap over runs, stratified by size: weights of the runs in each draw, and percentile intervals.

In each stratum of m runs, m − 1 are drawn with replacement, with weight m/(m − 1) each (Rao and Wu 1988, J.
Am. Stat. Assoc. 83). Drawing m runs would make the variance of a mean too small by (m − 1)/m, by half for m =
2. Sizes with a single run form one common stratum. Variants are paired: the draws are over the union of their
(size, budget, seed), and each variant uses the weights of its runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import FloatArray

LEVEL = 0.95
# With fewer draws, none lies outside an interval that excludes 2.5 % on each side.
FEWEST_DRAWS = 40

Interval = tuple[float, float]


def draw_weights(strata: Sequence[str], *, num_draws: int, seed: int) -> FloatArray:
    """Return the weight of each run in each draw, with shape (draws, runs).

    Args:
        strata: The stratum of each run.
        num_draws: Number of draws.
        seed: Seed of the generator.

    Raises:
        FieldError: There are too few draws for an interval, or fewer than two runs.
    """
    if num_draws < FEWEST_DRAWS:
        raise FieldError("--bootstraps", num_draws, f"an interval needs at least {FEWEST_DRAWS}", "use 1000")
    if len(strata) < 2:
        raise FieldError("runs", len(strata), "a bootstrap needs at least two", "add runs")
    generator = np.random.default_rng(seed)
    labels = np.array(strata, dtype=str)
    names, counts = np.unique(labels, return_counts=True)
    single = np.isin(labels, names[counts == 1])
    groups = [np.flatnonzero(labels == name) for name in names[counts > 1]]
    if single.sum() == 1:
        # A single run cannot be exchanged with another, so that every draw contains it.
        weights = np.where(single, 1.0, 0.0) * np.ones((num_draws, 1))
    else:
        weights = np.zeros((num_draws, len(labels)))
        groups += [np.flatnonzero(single)] if single.any() else []
    for group in groups:
        drawn = len(group) - 1
        counted = generator.multinomial(drawn, np.full(len(group), 1 / len(group)), size=num_draws)
        weights[:, group] = counted * (len(group) / drawn)
    return weights


def percentile_interval(draws: FloatArray, *, level: float = LEVEL) -> Interval:
    """Return the interval that contains the central fraction `level` of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def percentile_intervals(
    quantities: Mapping[str, FloatArray], *, level: float = LEVEL
) -> dict[str, Interval]:
    """Return the interval of each quantity."""
    return {name: percentile_interval(draws, level=level) for name, draws in quantities.items()}
