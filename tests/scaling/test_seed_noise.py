"""Seed noise: coverage of intervals, the number of seeds needed, and the smallest detectable difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sas_megatron.scaling.seed_noise import (
    CellDifference,
    DifferenceNoise,
    SeedNoise,
    adjust_p_values,
    average_budgets,
    average_difference,
    count_seeds_needed,
    estimate_noise,
    pool_deviation,
    smallest_detectable_difference,
)


def cell(*pairs: float, size: str = "s", budget: str = "b") -> CellDifference:
    return CellDifference(size, budget, dict(enumerate(pairs)))


def test_deviation_is_pooled_over_groups_with_repetitions() -> None:
    assert pool_deviation([[3.0, 3.2], [9.0], [1.0, 1.1, 1.2]]) == pytest.approx(((0.04 / 3) ** 0.5, 3))
    assert pool_deviation([[3.0], [4.0]]) is None


def test_single_cell_equals_the_paired_t_test() -> None:
    candidate, baseline = np.array([3.1, 3.0, 3.25, 2.9]), np.array([3.2, 3.15, 3.3, 3.1])
    cells = [cell(*(candidate - baseline))]
    found = average_difference(cells, estimate_noise(cells, []))
    test = stats.ttest_rel(candidate, baseline)
    expected = test.confidence_interval(0.95)
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.noise is not None
    assert not found.noise.assumed


def test_intervals_over_cells_have_their_nominal_coverage() -> None:
    generator, covered = np.random.default_rng(2), 0
    means = np.array([0.1, -0.2, 0.4])
    for _ in range(2000):
        cells = [
            cell(*(mean + generator.standard_normal(count)), size=str(mean))
            for mean, count in zip(means, (2, 3, 2), strict=True)
        ]
        interval = average_difference(cells, estimate_noise(cells, [])).interval
        assert interval is not None
        covered += interval[0] <= means.mean() <= interval[1]
    assert 0.934 <= covered / 2000 <= 0.966


def test_intervals_with_missing_budgets_have_their_nominal_coverage() -> None:
    # One seed of three was trained on the first budget only; the effect of a seed is the same on all budgets.
    generator, covered = np.random.default_rng(4), 0
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
        covered += found.interval[0] <= 0 <= found.interval[1]
    assert 0.934 <= covered / 2000 <= 0.966


def test_seeds_are_averaged_over_shared_budgets() -> None:
    assert average_budgets([{0: 1.0, 1: 3.0}, {0: 2.0, 1: 8.0}]) == pytest.approx((1.5, 5.5))
    # Seed 2 equals seed 0 on its only shared budget; the mean over cells is unchanged.
    one, two, three = average_budgets([{0: 1.0, 1: 3.0, 2: 1.0}, {0: 2.0, 1: 4.0}, {2: 7.0}])
    assert (one, two - one) == pytest.approx((three, 2.0))
    assert np.mean([one, two, three]) == pytest.approx((5 / 3 + 3 + 7) / 3)
    assert average_budgets([{0: 1.0}, {1: 5.0}]) == ()


def test_noise_without_repeated_pairs_is_that_of_one_variant() -> None:
    generator, covered = np.random.default_rng(3), 0
    for _ in range(2000):
        cells = [cell(float(generator.standard_normal() - generator.standard_normal()))]
        noise = estimate_noise(cells, [[dict(enumerate(generator.standard_normal(4)))], [{0: 1.0}]])
        assert noise is not None
        assert (noise.assumed, noise.degrees) == (True, 3)
        interval = average_difference(cells, noise).interval
        assert interval is not None
        covered += interval[0] <= 0 <= interval[1]
    assert 0.934 <= covered / 2000 <= 0.966


def test_variants_without_shared_seeds_are_compared_by_their_means() -> None:
    losses = dict(enumerate((4.0, 4.0, 1.0, 3.0)))
    unpaired = CellDifference("s", "b", {}, candidate={7: 1.0, 8: 2.0}, baseline=losses)
    found = average_difference([unpaired], DifferenceNoise(0.2, 3, assumed=True))
    assert found.difference == pytest.approx(-1.5)
    assert found.interval is not None
    # The variance is 1/2 + 1/4 of a run's variance (Welch), which is half of a pair's variance.
    half_width = stats.t.ppf(0.975, 3) * 0.2 * math.sqrt(0.375)
    assert found.interval[1] - found.difference == pytest.approx(half_width)


def test_interval_is_missing_without_repetitions() -> None:
    # Two budgets with one seed each are not repetitions.
    cells = [cell(0.1), CellDifference("s", "c", {1: 0.2})]
    found = average_difference(cells, estimate_noise(cells, [[{0: 1.0}, {1: 2.0}]]))
    assert (found.difference, found.interval) == (pytest.approx(0.15), None)


def test_p_values_are_adjusted_by_holms_method() -> None:
    # In ascending order the p-values become 3 × 0.01, 2 × 0.03, and 1 × 0.04, which is raised to 0.06.
    assert adjust_p_values([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert adjust_p_values([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert adjust_p_values([0.02]) == [0.02]
    assert adjust_p_values([]) == []


@pytest.mark.parametrize(("difference", "cells"), [(1.0, 1), (0.3, 1), (0.4, 4)])
def test_number_of_seeds_gives_a_power_of_80_percent(difference: float, cells: int) -> None:
    needed = count_seeds_needed(difference, 0.5, cells)
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


def test_zero_difference_has_no_number_of_seeds() -> None:
    assert count_seeds_needed(0.0, 0.5, 3) is None
    assert count_seeds_needed(1e-6, 0.5, 3) is None
    assert count_seeds_needed(1.0, 0.0, 3) == 2
    assert math.isclose(count_seeds_needed(100.0, 0.5, 1) or 0, 2)


@pytest.mark.parametrize(("seeds", "cells"), [((3, 3), 1), ((5, 2), 1), ((3, 1), 6)])
def test_smallest_detectable_difference_is_detected_in_80_percent_of_studies(
    seeds: tuple[int, int], cells: int
) -> None:
    sigma, draws = 0.02, 20_000
    generator = np.random.default_rng(5)
    noise = SeedNoise(sigma, degrees=None)
    difference = smallest_detectable_difference(noise, seeds=seeds, num_cells=cells)
    one, two = (generator.normal(0, sigma, (draws, cells, count)).mean(axis=(1, 2)) for count in seeds)
    error = sigma * ((1 / seeds[0] + 1 / seeds[1]) / cells) ** 0.5
    found = np.abs(one - two + difference) / error > stats.norm.ppf(0.975)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_noise_measured_with_few_seeds_increases_the_detectable_difference() -> None:
    given = smallest_detectable_difference(SeedNoise(0.01, degrees=None), seeds=(3, 3))
    measured = [
        smallest_detectable_difference(SeedNoise(0.01, degrees), seeds=(3, 3)) for degrees in (2, 10, 10_000)
    ]
    assert measured[0] > measured[1] > measured[2]
    assert measured[2] == pytest.approx(given, rel=1e-3)
