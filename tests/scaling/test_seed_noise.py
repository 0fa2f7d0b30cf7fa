"""Differences against the noise of seeds: intervals that hold, and the number of seeds that would tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sas_megatron.scaling.seed_noise import (
    CellDifference,
    Noise,
    adjust_p_values,
    average_budgets,
    average_difference,
    count_seeds_that_tell,
    estimate_noise,
    pool_deviation,
)


def cell(*pairs: float, size: str = "s", budget: str = "b") -> CellDifference:
    return CellDifference(size, budget, dict(enumerate(pairs)))


def test_the_deviation_is_pooled_over_groups_that_repeat() -> None:
    assert pool_deviation([[3.0, 3.2], [9.0], [1.0, 1.1, 1.2]]) == pytest.approx(((0.04 / 3) ** 0.5, 3))
    assert pool_deviation([[3.0], [4.0]]) is None


def test_one_cell_is_the_paired_t_test() -> None:
    candidate, baseline = np.array([3.1, 3.0, 3.25, 2.9]), np.array([3.2, 3.15, 3.3, 3.1])
    cells = [cell(*(candidate - baseline))]
    found = average_difference(cells, estimate_noise(cells, []))
    test = stats.ttest_rel(candidate, baseline)
    expected = test.confidence_interval(0.95)
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.noise is not None
    assert not found.noise.assumed


def test_intervals_over_cells_hold_the_mean_as_often_as_they_say() -> None:
    generator, held = np.random.default_rng(2), 0
    means = np.array([0.1, -0.2, 0.4])
    for _ in range(2000):
        cells = [
            cell(*(mean + generator.standard_normal(count)), size=str(mean))
            for mean, count in zip(means, (2, 3, 2), strict=True)
        ]
        interval = average_difference(cells, estimate_noise(cells, [])).interval
        assert interval is not None
        held += interval[0] <= means.mean() <= interval[1]
    assert 0.934 <= held / 2000 <= 0.966


def test_budgets_of_a_seed_count_once_where_some_are_missing_too() -> None:
    # One seed of three has run on the first budget only; what a seed adds, it adds on every budget.
    generator, held = np.random.default_rng(4), 0
    for _ in range(2000):
        cells = []
        for size in "ab":
            of_seeds = generator.standard_normal(3)
            for budget, count in enumerate((3, 2, 2)):
                noise = of_seeds[:count] + 0.1 * generator.standard_normal(count)
                cells.append(cell(*noise, size=size, budget=str(budget)))
        found = average_difference(cells, estimate_noise(cells, []))
        assert found.noise is not None
        assert found.noise.degrees == 4
        assert found.interval is not None
        held += found.interval[0] <= 0 <= found.interval[1]
    assert 0.934 <= held / 2000 <= 0.966


def test_seeds_are_averaged_over_budgets_that_they_share() -> None:
    assert average_budgets([{0: 1.0, 1: 3.0}, {0: 2.0, 1: 8.0}]) == pytest.approx((1.5, 5.5))
    # Seed 2 stands as seed 0 does on the one budget it has; the mean over cells stays as it is.
    one, two, three = average_budgets([{0: 1.0, 1: 3.0, 2: 1.0}, {0: 2.0, 1: 4.0}, {2: 7.0}])
    assert (one, two - one) == pytest.approx((three, 2.0))
    assert np.mean([one, two, three]) == pytest.approx((5 / 3 + 3 + 7) / 3)
    assert average_budgets([{0: 1.0}, {1: 5.0}]) == ()


def test_without_repeated_pairs_the_noise_of_one_variants_seeds_is_assumed() -> None:
    generator, held = np.random.default_rng(3), 0
    for _ in range(2000):
        cells = [cell(float(generator.standard_normal() - generator.standard_normal()))]
        noise = estimate_noise(cells, [[dict(enumerate(generator.standard_normal(4)))], [{0: 1.0}]])
        assert noise is not None
        assert (noise.assumed, noise.degrees) == (True, 3)
        interval = average_difference(cells, noise).interval
        assert interval is not None
        held += interval[0] <= 0 <= interval[1]
    assert 0.934 <= held / 2000 <= 0.966


def test_seeds_that_are_not_shared_are_compared_in_the_mean() -> None:
    losses = dict(enumerate((4.0, 4.0, 1.0, 3.0)))
    unpaired = CellDifference("s", "b", {}, candidate={7: 1.0, 8: 2.0}, baseline=losses)
    found = average_difference([unpaired], Noise(0.2, 3, assumed=True))
    assert found.difference == pytest.approx(-1.5)
    assert found.interval is not None
    # Welch's 1/2 + 1/4 of a run's variance, of which a pair has two.
    reach = stats.t.ppf(0.975, 3) * 0.2 * math.sqrt(0.375)
    assert found.interval[1] - found.difference == pytest.approx(reach)


def test_without_any_repeat_there_is_no_interval() -> None:
    # Two budgets with a seed each are no two seeds.
    cells = [cell(0.1), CellDifference("s", "c", {1: 0.2})]
    found = average_difference(cells, estimate_noise(cells, [[{0: 1.0}, {1: 2.0}]]))
    assert (found.difference, found.interval) == (pytest.approx(0.15), None)


def test_several_tests_are_adjusted_as_holm_does() -> None:
    # In order: 3 × 0.01, 2 × 0.03, and 1 × 0.04, which is no less than the one before it.
    assert adjust_p_values([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert adjust_p_values([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert adjust_p_values([0.02]) == [0.02]
    assert adjust_p_values([]) == []


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
