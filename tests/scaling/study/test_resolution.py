"""The smallest difference that a study's seeds would show."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sas_megatron.scaling.study.resolution import SeedNoise, measure_seed_noise, smallest_effect


def test_seed_noise_is_pooled_over_cells() -> None:
    noise = measure_seed_noise([[3.0, 3.2], [9.0], [1.0, 1.1, 1.2]])
    assert noise is not None
    assert noise.degrees == 3
    assert noise.deviation == pytest.approx(((0.02 + 0.02) / 3) ** 0.5)
    assert measure_seed_noise([[3.0], [4.0]]) is None


@pytest.mark.parametrize(("seeds", "cells"), [((3, 3), 1), ((5, 2), 1), ((3, 1), 6)])
def test_an_effect_of_that_size_is_found_four_times_of_five(seeds: tuple[int, int], cells: int) -> None:
    sigma, draws = 0.02, 20_000
    generator = np.random.default_rng(5)
    effect = smallest_effect(SeedNoise(sigma, degrees=None), seeds=seeds, cells=cells)
    one, two = (generator.normal(0, sigma, (draws, cells, count)).mean(axis=(1, 2)) for count in seeds)
    error = sigma * ((1 / seeds[0] + 1 / seeds[1]) / cells) ** 0.5
    found = np.abs(one - two + effect) / error > stats.norm.ppf(0.975)
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_noise_that_few_seeds_measured_tells_less() -> None:
    stated = smallest_effect(SeedNoise(0.01, degrees=None), seeds=(3, 3))
    measured = [smallest_effect(SeedNoise(0.01, degrees), seeds=(3, 3)) for degrees in (2, 10, 10_000)]
    assert measured[0] > measured[1] > measured[2]
    assert measured[2] == pytest.approx(stated, rel=1e-3)
