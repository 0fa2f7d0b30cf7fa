"""Bootstrap over runs: weights of the runs in each draw, and percentile intervals.

In each stratum of m runs, m − 1 are drawn with replacement, with weight m/(m − 1) each (Rao and Wu 1988, J.
Am. Stat. Assoc. 83). Drawing m runs would make the variance of a mean too small by (m − 1)/m, by half for m =
2. Strata are sizes; sizes with a single run form one common stratum.

If points are checkpoints of runs, whole runs are drawn, all from one stratum, since the errors of a run's
checkpoints are not independent. With 8 to 22 runs these intervals contained the truth in 93 to 99 % of 200
simulated tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import FloatArray
from sas_megatron.scaling.laws.points import Points

LEVEL = 0.95
# With fewer draws, none lies outside an interval that excludes 2.5 % on each side.
FEWEST_DRAWS = 40
# Weights per block of draws, so that a large table needs little memory.
BLOCK_WEIGHTS = 4_000_000
# Draws beyond this value count as infinite.
LARGEST_DRAW = 1e300

Interval = tuple[float, float]


def draw_point_weights(points: Points, *, num_draws: int, seed: int) -> Iterator[FloatArray]:
    """Yield the weight of each point in each draw, in blocks of draws with shape (draws, points).

    Points are drawn within their size, or whole runs if the points are checkpoints of runs.

    Raises:
        FieldError: There are too few draws for an interval, or fewer than two runs.
    """
    strata: Sequence[object] = points.sizes.tolist()
    run_of_point = np.arange(len(points))
    if points.runs is not None:
        names, run_of_point = np.unique(points.runs, return_inverse=True)
        strata = [0] * len(names)
    if num_draws < FEWEST_DRAWS:
        raise FieldError("--bootstraps", num_draws, f"an interval needs at least {FEWEST_DRAWS}", "use 1000")
    if len(strata) < 2:
        raise FieldError("runs", len(strata), "a bootstrap needs at least two", "add runs")
    generator = np.random.default_rng(seed)
    for first in range(0, num_draws, block := max(1, BLOCK_WEIGHTS // len(points))):
        weights = draw_weights(strata, num_draws=min(block, num_draws - first), generator=generator)
        yield weights[:, run_of_point]


def draw_weights(strata: Sequence[object], *, num_draws: int, generator: np.random.Generator) -> FloatArray:
    """Return the weight of each run in each draw, with shape (draws, runs), given the stratum of each run."""
    _, stratum_of_run, counts = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    members = np.split(np.argsort(stratum_of_run, kind="stable"), np.cumsum(counts)[:-1])
    groups = [group for group in members if len(group) > 1]
    singles = [group for group in members if len(group) == 1]
    weights = np.zeros((num_draws, len(strata)))
    if len(singles) == 1:
        # A single run cannot be exchanged with another, so that every draw contains it.
        weights[:, singles[0]] = 1
    elif singles:
        groups.append(np.sort(np.concatenate(singles)))
    for group in groups:
        drawn = len(group) - 1
        counted = generator.multinomial(drawn, np.full(len(group), 1 / len(group)), size=num_draws)
        weights[:, group] = counted * (len(group) / drawn)
    return weights


def percentile_interval(draws: FloatArray) -> Interval:
    """Return the interval that contains the central 95 % of the draws; NaN draws are ignored.

    An end among infinite draws is infinite. Without any draw, both ends are NaN.
    """
    known = np.clip(draws[~np.isnan(draws)], -LARGEST_DRAW, LARGEST_DRAW)
    if len(known) == 0:
        return np.nan, np.nan
    ends = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.where(np.abs(ends) > LARGEST_DRAW / 10, np.copysign(np.inf, ends), ends)
    return float(low), float(high)


def percentile_intervals(quantities: Mapping[str, FloatArray]) -> dict[str, Interval]:
    """Return the 95 % interval of each quantity."""
    return {name: percentile_interval(draws) for name, draws in quantities.items()}
