"""Coverage of bootstrap and profile-likelihood intervals on randomly drawn surfaces."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from scipy import optimize, stats

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws import resampling
from sas_megatron.scaling.laws.loss_surface import (
    Quantities,
    TokenCost,
    fit_surface,
    optimal_exponents,
    surface_quantities,
)
from sas_megatron.scaling.laws.points import Points
from sas_megatron.scaling.laws.profile import max_relative_increase, profile_intervals
from sas_megatron.scaling.laws.resampling import (
    draw_point_weights,
    draw_weights,
    percentile_interval,
    percentile_intervals,
)
from tests.scaling.synthetic import CHINCHILLA, draw_grid
from tests.selection import draws

NUM_BOOTSTRAPS = 100


def assert_nominal(held: Counter[str], num_draws: int) -> None:
    """Check the coverage: 926 to 971 of 1,000 intervals contain the truth with a probability of 99.9 %."""
    fewest, most = stats.binom.interval(0.999, num_draws, 0.95)
    assert fewest <= min(held.values()) <= max(held.values()) <= most, held


def true_values() -> dict[str, float]:
    surface = {name: np.array([value]) for name, value in dataclasses.asdict(CHINCHILLA).items()}
    quantities: Quantities = {**surface, **optimal_exponents(surface, TokenCost(6, 1, "flops"))}
    return {name: float(value[0]) for name, value in quantities.items()}


@pytest.mark.timeout(1800)
@draws(25, 1000)
def test_bootstrap_intervals_have_their_nominal_coverage(num_draws: int) -> None:
    truth, held = true_values(), Counter[str]()
    for seed in range(num_draws):
        points = draw_grid(seed)
        fit = fit_surface(points)
        drawn = surface_quantities(fit.problem, fit.resample(num_draws=NUM_BOOTSTRAPS, seed=seed))
        drawn |= optimal_exponents(drawn, TokenCost.of(points))
        for name, (low, high) in percentile_intervals(drawn).items():
            held[name] += low <= truth[name] <= high
    assert held.keys() == truth.keys()
    assert_nominal(held, num_draws)


@pytest.mark.timeout(1800)
@draws(25, 1000)
def test_profile_intervals_have_their_nominal_coverage(num_draws: int) -> None:
    truth, held = true_values(), Counter[str]()
    for seed in range(num_draws):
        intervals = profile_intervals(fit_surface(draw_grid(seed), delta=np.inf))
        for name, (low, high) in intervals.items():
            held[name] += (low is None or low <= truth[name]) and (high is None or truth[name] <= high)
    assert set(held) == {"E", "alpha", "beta"}
    assert_nominal(held, num_draws)


def test_profile_reaches_its_limit_at_the_ends_of_the_interval() -> None:
    points = draw_grid(3)
    fit = fit_surface(points, delta=np.inf)
    limit = fit.fit.objective * (1 + max_relative_increase(len(points), 5))
    # With α fixed, SciPy minimizes over the other four parameters.
    for end in profile_intervals(fit)["alpha"]:
        assert end is not None

        def objective(free: np.ndarray, end: float = end) -> float:
            theta = np.array([*free[:3], end, free[3]])
            return float(fit.problem.problem.expand(theta[None], np.ones((1, len(points)))).value[0])

        start = np.delete(fit.fit.theta, 3)
        options = {"maxiter": 4000, "xatol": 1e-9}
        found = optimize.minimize(objective, start, method="Nelder-Mead", options=options)
        assert found.fun == pytest.approx(limit, rel=1e-3)


def test_undetermined_end_of_an_interval_is_open() -> None:
    # The irreducible loss is zero, and the points do not exclude a small one.
    truth = dataclasses.replace(CHINCHILLA, E=1e-6)
    intervals = profile_intervals(fit_surface(draw_grid(0, noise=0.02, truth=truth), delta=np.inf))
    assert intervals["E"][0] == 0.0


def test_draws_preserve_the_weight_of_each_stratum() -> None:
    strata = ["a"] * 3 + ["b"] * 5 + ["c", "d", "e"]
    weights = draw_weights(strata, num_draws=400, generator=np.random.default_rng(3))
    for rows in (slice(0, 3), slice(3, 8), slice(8, 11)):
        np.testing.assert_allclose(weights[:, rows].sum(axis=1), rows.stop - rows.start)
    assert not np.allclose(weights[:, 8], 1)
    # A single run cannot be exchanged with another.
    weights = draw_weights(["a", "a", "b"], num_draws=40, generator=np.random.default_rng(0))
    np.testing.assert_array_equal(weights[:, 2], 1)


@pytest.mark.parametrize("runs", [2, 3, 7])
def test_variance_of_a_mean_is_unbiased_with_few_seeds(runs: int) -> None:
    values = np.random.default_rng(0).standard_normal(runs)
    means = draw_weights(["a"] * runs, num_draws=40_000, generator=np.random.default_rng(1)) @ values / runs
    assert means.var() == pytest.approx(values.var(ddof=1) / runs, rel=0.05)


def test_percentile_interval_excludes_a_fortieth_on_each_side() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))


@pytest.mark.parametrize(("strata", "number"), [(["a"], 100), (["a", "b"], 39)])
def test_too_few_runs_or_draws_are_refused(strata: list[str], number: int) -> None:
    points = Points.of([1] * len(strata), [1] * len(strata), [1] * len(strata), sizes=strata)
    with pytest.raises(FieldError):
        next(draw_point_weights(points, num_draws=number, seed=0))


def test_points_without_a_size_are_stratified_by_parameters() -> None:
    points = Points.of([20, 10, 10], [1, 2, 3], [3, 2, 1])
    assert points.sizes.tolist() == [1, 0, 0]
    # Sizes in billions must not be rounded to whole numbers.
    assert Points.of([0.2, 0.4, 0.4], [1, 2, 3], [3, 2, 1]).sizes.tolist() == [0, 1, 1]


def test_intervals_are_independent_of_units() -> None:
    points = draw_grid(2)
    scaled = Points.of(
        points.params / 1e9, points.tokens / 1e12, points.loss / np.log(2), flops=points.compute / 1e18
    )
    for name in ("alpha", "beta"):
        intervals = []
        for each in (points, scaled):
            fit = fit_surface(each)
            drawn = surface_quantities(fit.problem, fit.resample(num_draws=NUM_BOOTSTRAPS, seed=1))
            intervals.append(percentile_interval(drawn[name]))
        assert intervals[1] == pytest.approx(intervals[0], rel=1e-6)


def test_blocks_of_draws_are_the_draws_of_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    points = draw_grid(0).take(np.arange(12))
    (expected,) = draw_point_weights(points, num_draws=50, seed=4)
    monkeypatch.setattr(resampling, "BLOCK_WEIGHTS", 25 * 12)
    blocks = list(draw_point_weights(points, num_draws=50, seed=4))
    assert [len(block) for block in blocks] == [25, 25]
    np.testing.assert_array_equal(blocks[0][:, :3].sum(axis=1), expected[:25, :3].sum(axis=1))
    assert not np.array_equal(blocks[0], blocks[1])


def test_infinite_draws_give_an_infinite_end_and_undefined_draws_none() -> None:
    draws = np.concatenate([np.arange(90.0), np.full(10, np.inf)])
    low, high = percentile_interval(draws)
    assert (low, high) == (pytest.approx(2.475), np.inf)
    assert percentile_interval(np.append(draws[:90], np.nan)) == percentile_interval(draws[:90])
    assert np.isnan(percentile_interval(np.full(5, np.nan))).all()
