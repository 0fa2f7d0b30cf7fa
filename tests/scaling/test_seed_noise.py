"""Differences against the noise of seeds: intervals that hold, and the number of seeds that would tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sas_megatron.scaling.seed_noise import (
    CellDifference,
    average_difference,
    count_seeds_that_tell,
    estimate_noise,
)


def cell(*pairs: float) -> CellDifference:
    return CellDifference("s", "b", tuple(pairs))


def test_one_cell_is_the_paired_t_test() -> None:
    candidate, baseline = np.array([3.1, 3.0, 3.25, 2.9]), np.array([3.2, 3.15, 3.3, 3.1])
    cells = [cell(*(candidate - baseline))]
    found = average_difference(cells, estimate_noise(cells, []))
    expected = stats.ttest_rel(candidate, baseline).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.noise is not None
    assert not found.noise.assumed


def test_intervals_over_cells_hold_the_mean_as_often_as_they_say() -> None:
    generator, held = np.random.default_rng(2), 0
    means = np.array([0.1, -0.2, 0.4])
    for _ in range(2000):
        cells = [
            cell(*(mean + generator.standard_normal(count)))
            for mean, count in zip(means, (2, 3, 2), strict=True)
        ]
        interval = average_difference(cells, estimate_noise(cells, [])).interval
        assert interval is not None
        held += interval[0] <= means.mean() <= interval[1]
    assert 0.934 <= held / 2000 <= 0.966


def test_without_repeated_pairs_the_noise_of_one_variants_seeds_is_assumed() -> None:
    generator, held = np.random.default_rng(3), 0
    for _ in range(2000):
        cells = [cell(float(generator.standard_normal() - generator.standard_normal()))]
        noise = estimate_noise(cells, [generator.standard_normal(4).tolist(), [1.0]])
        assert noise is not None
        assert (noise.assumed, noise.degrees) == (True, 3)
        interval = average_difference(cells, noise).interval
        assert interval is not None
        held += interval[0] <= 0 <= interval[1]
    assert 0.934 <= held / 2000 <= 0.966


def test_seeds_that_are_not_shared_are_compared_in_the_mean() -> None:
    unpaired = CellDifference("s", "b", (), candidate=(1.0, 2.0), baseline=(4.0, 4.0, 1.0, 3.0))
    assert unpaired.difference == pytest.approx(-1.5)
    # Welch's 1/2 + 1/4 of a run's variance, of which a pair has two.
    assert unpaired.variance_share == pytest.approx(0.375)


def test_without_any_repeat_there_is_no_interval() -> None:
    cells = [cell(0.1), cell(0.2)]
    found = average_difference(cells, estimate_noise(cells, [[1.0], [2.0]]))
    assert (found.difference, found.interval) == (pytest.approx(0.15), None)


@pytest.mark.parametrize(("difference", "cells"), [(1.0, 1), (0.3, 1), (0.4, 4)])
def test_so_many_seeds_find_the_difference_in_four_studies_of_five(difference: float, cells: int) -> None:
    needed = count_seeds_that_tell(difference, 0.5, cells)
    assert needed is not None
    generator = np.random.default_rng(0)
    powers = []
    for seeds in (needed - 1, needed):
        if seeds < 2:
            powers.append(0.0)
            continue
        draws = difference + 0.5 * generator.standard_normal((20_000, cells, seeds))
        pooled = draws.var(axis=2, ddof=1).mean(axis=1)
        degrees = cells * (seeds - 1)
        ratio = np.abs(draws.mean(axis=(1, 2))) / np.sqrt(pooled / (cells * seeds))
        powers.append(float((ratio > stats.t.ppf(0.975, degrees)).mean()))
    assert powers[0] < 0.81
    assert powers[1] > 0.79


def test_a_difference_of_nothing_takes_no_number_of_seeds() -> None:
    assert count_seeds_that_tell(0.0, 0.5, 3) is None
    assert count_seeds_that_tell(1e-6, 0.5, 3) is None
    assert count_seeds_that_tell(1.0, 0.0, 3) == 2
    assert math.isclose(count_seeds_that_tell(100.0, 0.5, 1) or 0, 2)
