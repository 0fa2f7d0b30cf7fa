"""Adjusted p-values, the number of seeds that a test needs, and the smallest detectable difference."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sas_megatron.scaling.significance import (
    add_variances,
    adjust_p_values,
    count_seeds_needed,
    smallest_detectable_difference,
)


def test_p_values_are_adjusted_by_holms_method() -> None:
    # In ascending order the p-values become 3 × 0.01, 2 × 0.03, and 1 × 0.04, which is raised to 0.06.
    assert adjust_p_values([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert adjust_p_values([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert adjust_p_values([0.02]) == [0.02]
    assert adjust_p_values([]) == []


def test_degrees_of_freedom_of_a_sum_are_those_of_welchs_test() -> None:
    one, two = np.array([27.5, 21.0, 19.0, 23.6]), np.array([27.1, 22.0, 20.8, 23.4, 23.4, 23.5])
    parts = [(float(values.var(ddof=1)) / len(values), len(values) - 1) for values in (one, two)]
    variance, degrees = add_variances(parts)
    test = stats.ttest_ind(one, two, equal_var=False)
    assert degrees == pytest.approx(test.df)
    assert (one.mean() - two.mean()) / math.sqrt(variance) == pytest.approx(test.statistic)
    # An exactly known part adds no uncertainty of its own.
    assert add_variances([(1.0, 3.0), (1.0, math.inf)]) == (2.0, 12.0)


@pytest.mark.parametrize(("difference", "variants"), [(1.0, 2), (0.5, 2), (0.5, 4)])
def test_number_of_seeds_gives_a_power_of_80_percent(difference: float, variants: int) -> None:
    # The difference of two variants with the deviation 0.5 of single seeds.
    needed = count_seeds_needed(difference, 0.5, variants)
    assert needed is not None
    generator = np.random.default_rng(0)
    powers = []
    for seeds in (needed - 1, needed):
        if seeds < 2:
            powers.append(0.0)
            continue
        degrees = (variants - 1) * (seeds - 1)
        means = difference + 0.5 / math.sqrt(seeds) * generator.standard_normal(20_000)
        deviations = 0.5 * np.sqrt(generator.chisquare(degrees, 20_000) / degrees)
        ratio = np.abs(means) / (deviations / math.sqrt(seeds))
        powers.append(float((ratio > stats.t.ppf(0.975, degrees)).mean()))
    assert powers[0] < 0.81
    assert powers[1] > 0.79


def test_zero_difference_has_no_number_of_seeds() -> None:
    assert count_seeds_needed(0.0, 0.5) is None
    assert count_seeds_needed(1e-6, 0.5) is None
    assert count_seeds_needed(1.0, 0.0) == 2
    assert count_seeds_needed(100.0, 0.5) == 2
    assert count_seeds_needed(1.0, 0.5, num_comparisons=6) > count_seeds_needed(1.0, 0.5)  # type: ignore[operator]


@pytest.mark.parametrize("seeds", [(3, 3), (5, 2)])
def test_smallest_detectable_difference_is_detected_in_80_percent_of_studies(seeds: tuple[int, int]) -> None:
    sigma, draws = 0.02, 20_000
    generator = np.random.default_rng(5)
    difference = smallest_detectable_difference(sigma, None, seeds=seeds)
    one, two = (generator.normal(0, sigma, (draws, count)).mean(axis=1) for count in seeds)
    error = sigma * (1 / seeds[0] + 1 / seeds[1]) ** 0.5
    found = np.abs(one - two + difference) / error > stats.norm.ppf(0.975)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_noise_measured_with_few_seeds_increases_the_detectable_difference() -> None:
    given = smallest_detectable_difference(0.01, None, seeds=(3, 3))
    measured = [smallest_detectable_difference(0.01, degrees, seeds=(3, 3)) for degrees in (2, 10, 10_000)]
    assert measured[0] > measured[1] > measured[2]
    assert measured[2] == pytest.approx(given, rel=1e-3)
