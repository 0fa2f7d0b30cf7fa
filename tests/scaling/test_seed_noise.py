"""Noise between seeds: textbook analyses of variance, weights by budget, missing runs and outliers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from sas_megatron.scaling.analysis_of_variance import analyze_variance
from sas_megatron.scaling.seed_noise import NoiseModel
from sas_megatron.scaling.significance import Estimate

CELL = ("s", "1")
# Yields of four treatments (rows) in five blends: Box, Hunter and Hunter 1978, Statistics for Experimenters,
# table 7.1. Their analysis of variance: blends 264 with 4 degrees of freedom, residuals 226 with 12.
PENICILLIN = ((89, 84, 81, 87, 79), (88, 77, 87, 92, 81), (97, 92, 87, 89, 80), (94, 79, 85, 84, 88))
BLEND_SQUARES, RESIDUAL_SQUARES = 264.0, 226.0


def build(**losses: tuple[float, ...]) -> NoiseModel:
    """Build the noise of one cell from the losses of each variant by seed."""
    return NoiseModel.of({name: {CELL: dict(enumerate(values))} for name, values in losses.items()})


def estimate(noise: NoiseModel, candidate: str, baseline: str) -> Estimate:
    one = {CELL: 1.0}
    means = noise.tables[candidate].means[CELL], noise.tables[baseline].means[CELL]
    return noise.estimate(means[0] - means[1], candidate=candidate, baseline=baseline, weights=(one, one))


def test_two_variants_equal_the_paired_t_test() -> None:
    candidate, baseline = (3.1, 3.0, 3.25, 2.9), (3.2, 3.15, 3.3, 3.1)
    found = estimate(build(mha=baseline, sas=candidate), "sas", "mha")
    test = stats.ttest_rel(candidate, baseline)
    expected = test.confidence_interval(0.95)
    assert found.degrees == pytest.approx(3)
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.deviation == pytest.approx(np.std(np.subtract(candidate, baseline), ddof=1))


def test_more_variants_equal_a_published_analysis_of_variance_in_blocks() -> None:
    sums = analyze_variance([dict(enumerate(row)) for row in PENICILLIN])
    assert (sums.seeds, sums.seeds_degrees) == (pytest.approx(BLEND_SQUARES), 4)
    assert (sums.interaction, sums.interaction_degrees) == (pytest.approx(RESIDUAL_SQUARES), 12)
    found = estimate(build(**dict(zip("abcd", PENICILLIN, strict=True))), "c", "a")
    assert found.difference == pytest.approx(89 - 84)
    assert found.degrees == pytest.approx(12)
    assert found.error == pytest.approx(math.sqrt(RESIDUAL_SQUARES / 12 * 2 / 5))


def test_variant_with_one_seed_is_compared_with_the_mean_of_the_other_seeds() -> None:
    noise = build(**dict(zip("abcd", PENICILLIN, strict=True)), e=(90,))
    found = estimate(noise, "e", "a")
    assert found.difference == pytest.approx(90 - 84)
    # Expected mean squares of the blends σ² + 4 σ_B² and of the residuals σ² (Box, Hunter and Hunter). The
    # difference has the variance σ² (1 + 1/5) + σ_B² (1 − 1/5), which is the residual mean square plus 1/5 of
    # that of the blends; its degrees of freedom follow Satterthwaite (1946, equation 17).
    residual, blends = RESIDUAL_SQUARES / 12, BLEND_SQUARES / 4 / 5
    assert found.error == pytest.approx(math.sqrt(residual + blends))
    assert found.degrees == pytest.approx((residual + blends) ** 2 / (residual**2 / 12 + blends**2 / 4))


def test_baseline_alone_with_several_seeds_gives_the_two_sample_error() -> None:
    losses = (4.0, 4.2, 3.9, 4.3)
    found = estimate(build(mha=losses, gqa=(4.4,)), "gqa", "mha")
    # Each seed has the variance of the baseline's seeds: that of a single value and that of a mean of four.
    assert found.error == pytest.approx(np.std(losses, ddof=1) * math.sqrt(1 + 1 / 4))
    assert found.degrees == 3


def test_single_seeds_give_no_interval() -> None:
    found = estimate(build(mha=(4.0,), sas=(3.9,)), "sas", "mha")
    assert (found.interval, found.p_value) == (None, None)


def test_noise_of_a_mean_is_that_of_the_seeds_and_not_of_the_runs() -> None:
    # All cells of a seed have the same error: a mean over eight cells is as uncertain as one of them.
    errors = {"mha": (0.1, -0.1, 0.0), "sas": (-0.05, 0.0, 0.15)}
    cells = [(f"s{size}", f"{budget}") for size in range(4) for budget in (2, 4)]
    losses = {
        name: {cell: {seed: 4.0 + error for seed, error in enumerate(values)} for cell in cells}
        for name, values in errors.items()
    }
    noise = NoiseModel.of(losses)
    mean = dict.fromkeys(cells, 1 / 8)
    one = {cells[0]: 1.0}
    found = [
        noise.estimate(0.1, candidate="sas", baseline="mha", weights=(weights, weights)).error
        for weights in (mean, one)
    ]
    assert found[0] == pytest.approx(found[1])


def test_differences_are_weighted_by_the_noise_of_their_budget() -> None:
    generator = np.random.default_rng(0)
    deviations = {"2": 0.08, "8": 0.04}
    cells = [(f"s{size}", budget) for size in range(40) for budget in deviations]
    losses = {
        name: {
            cell: dict(enumerate(4 + deviations[cell[1]] * generator.standard_normal(4))) for cell in cells
        }
        for name in ("mha", "sas")
    }
    noise = NoiseModel.of(losses)
    assert noise.deviations == pytest.approx(deviations, rel=0.1)
    shares = noise.weigh([({cell: 1.0}, {cell: 1.0}) for cell in cells[:2]])
    assert shares == pytest.approx((0.2, 0.8), abs=0.04)


def test_few_seeds_do_not_give_all_weight_to_one_budget() -> None:
    # Two runs that happen to lie together: their variance is 10,000 times smaller than that of the others.
    losses = {("s", "2"): {0: 4.0, 1: 4.2}, ("s", "4"): {0: 3.9, 1: 3.902}}
    noise = NoiseModel.of({"mha": losses})
    shares = noise.weigh([({cell: 1.0}, {cell: 1.0}) for cell in losses])
    assert 0.3 < shares[0] < 0.5


def test_missing_runs_are_completed_by_the_effect_of_their_seed() -> None:
    losses = {("s", "2"): {0: 4.0, 1: 4.4}, ("s", "4"): {0: 3.0, 1: 3.4, 2: 3.2}}
    table = NoiseModel.of({"mha": losses}).tables["mha"]
    assert table.losses == pytest.approx(np.array([[4.0, 4.4, 4.2], [3.0, 3.4, 3.2]]))
    # A seed that shares no cell with another one contributes to the mean of its cell alone.
    apart = NoiseModel.of({"mha": {**losses, ("t", "2"): {7: 5.0}}}).tables["mha"]
    assert apart.seeds == (0, 1, 2)
    assert apart.means["t", "2"] == pytest.approx(5.0)
    alone = NoiseModel.of({"mha": {("s", "2"): {0: 4.0}, ("s", "4"): {1: 3.0}}}).tables["mha"]
    assert (len(alone.seeds), alone.means) == (1, {("s", "2"): 4.0, ("s", "4"): 3.0})


def test_outlier_is_more_than_three_deviations_from_the_other_seeds() -> None:
    generator = np.random.default_rng(1)
    losses = {
        (f"s{size}", "2"): dict(enumerate(4 + 0.03 * generator.standard_normal(3))) for size in range(20)
    }
    assert NoiseModel.of({"mha": losses}).find_outliers() == ()
    losses["s7", "2"][1] += 0.3
    (found,) = NoiseModel.of({"mha": losses}).find_outliers()
    assert (found.variant, found.cell, found.seed) == ("mha", ("s7", "2"), 1)
    assert found.deviations > 3
