"""Bootstrap over runs: weights for each draw, stratified by size; and percentile intervals of what comes out.

In each stratum of m runs, m − 1 are drawn with replacement and weigh m/(m − 1) each (Rao and Wu 1988, J. Am.
Stat. Assoc. 83). Drawing m makes the variance of a mean too small by (m − 1)/m, by half where m is 2.
Sizes with a single run are one stratum together. Variants are paired by drawing runs of the union of their
(size, budget, seed) once, and giving each variant the weights of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import FloatArray

LEVEL = 0.95
# An interval's ends are the 2.5 % at each side: of fewer draws than this there is not one beyond them.
FEWEST_DRAWS = 40

Interval = tuple[float, float]


def draw_weights(strata: Sequence[str], *, num_draws: int, seed: int) -> FloatArray:
    """How much each run weighs in each draw, (draws, runs).

    Raises:
        FieldError: there are too few draws for an interval, or there is a single run.
    """
    if num_draws < FEWEST_DRAWS:
        raise FieldError("--bootstraps", num_draws, f"an interval takes at least {FEWEST_DRAWS}", "draw 1000")
    if len(strata) < 2:
        raise FieldError("runs", len(strata), "a bootstrap takes at least two", "add runs")
    generator = np.random.default_rng(seed)
    labels = np.array(strata, dtype=str)
    names, counts = np.unique(labels, return_counts=True)
    single = np.isin(labels, names[counts == 1])
    groups = [np.flatnonzero(labels == name) for name in names[counts > 1]]
    if single.sum() == 1:
        # One run alone has nothing to be exchanged with and is in every draw.
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
    """The middle `level` of the draws."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def percentile_intervals(
    quantities: Mapping[str, FloatArray], *, level: float = LEVEL
) -> dict[str, Interval]:
    """An interval for each quantity."""
    return {name: percentile_interval(draws, level=level) for name, draws in quantities.items()}
