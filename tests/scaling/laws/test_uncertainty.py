"""Intervals hold the truth as often as they say: bootstrap and profile likelihood, on surfaces drawn anew."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from scipy import optimize, stats

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.loss_surface import (
    Quantities,
    TokenCost,
    fit_surface,
    optimal_exponents,
    surface_quantities,
)
from sas_megatron.scaling.laws.points import Points
from sas_megatron.scaling.laws.profile import largest_rise, profile_intervals
from sas_megatron.scaling.laws.resampling import draw_weights, percentile_interval, percentile_intervals
from tests.scaling.synthetic import CHINCHILLA, draw_grid
from tests.selection import draws

NUM_BOOTSTRAPS = 100


def assert_nominal(held: Counter[str], num_draws: int) -> None:
    """Intervals of 95 %: of 200, 179 to 198 hold the truth in all but one case of a thousand."""
    fewest, most = stats.binom.interval(0.999, num_draws, 0.95)
    assert fewest <= min(held.values()) <= max(held.values()) <= most, held


def true_values() -> dict[str, float]:
    surface = {name: np.array([value]) for name, value in dataclasses.asdict(CHINCHILLA).items()}
    quantities: Quantities = {**surface, **optimal_exponents(surface, TokenCost(6, 1, "flops"))}
    return {name: float(value[0]) for name, value in quantities.items()}


@draws(25, 200)
def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say(num_draws: int) -> None:
    truth, held = true_values(), Counter[str]()
    for seed in range(num_draws):
        points = draw_grid(seed)
        fit = fit_surface(points)
        weights = draw_weights(points.sizes.tolist(), num_draws=NUM_BOOTSTRAPS, seed=seed)
        drawn = surface_quantities(fit.problem, fit.problem.refit(weights, fit.fit))
        drawn |= optimal_exponents(drawn, TokenCost.of(points))
        for name, (low, high) in percentile_intervals(drawn).items():
            held[name] += low <= truth[name] <= high
    assert held.keys() == truth.keys()
    assert_nominal(held, num_draws)


@draws(25, 200)
def test_profile_intervals_hold_the_truth_as_often_as_they_say(num_draws: int) -> None:
    truth, held = true_values(), Counter[str]()
    for seed in range(num_draws):
        intervals = profile_intervals(fit_surface(draw_grid(seed), delta=np.inf))
        for name, (low, high) in intervals.items():
            held[name] += (low is None or low <= truth[name]) and (high is None or truth[name] <= high)
    assert set(held) == {"E", "alpha", "beta"}
    assert_nominal(held, num_draws)


def test_at_the_ends_of_a_profile_the_best_of_the_rest_is_as_bad_as_allowed() -> None:
    points = draw_grid(3)
    fit = fit_surface(points, delta=np.inf)
    limit = fit.fit.objective * (1 + largest_rise(len(points), 5))
    # With α fixed, SciPy minimizes over the other four.
    for end in profile_intervals(fit)["alpha"]:
        assert end is not None

        def objective(free: np.ndarray, end: float = end) -> float:
            theta = np.array([*free[:3], end, free[3]])
            return float(fit.problem.problem.expand(theta[None], np.ones((1, len(points)))).value[0])

        start = np.delete(fit.fit.theta, 3)
        options = {"maxiter": 4000, "xatol": 1e-9}
        found = optimize.minimize(objective, start, method="Nelder-Mead", options=options)
        assert found.fun == pytest.approx(limit, rel=1e-3)


def test_an_end_that_the_points_do_not_give_is_open() -> None:
    # There is no irreducible loss, and nothing says that there is a little.
    truth = dataclasses.replace(CHINCHILLA, E=1e-6)
    intervals = profile_intervals(fit_surface(draw_grid(0, noise=0.02, truth=truth), delta=np.inf))
    assert intervals["E"][0] == 0.0


def test_draws_keep_each_stratum_as_heavy_as_it_is_and_singles_together() -> None:
    strata = ["a"] * 3 + ["b"] * 5 + ["c", "d", "e"]
    weights = draw_weights(strata, num_draws=400, seed=3)
    for rows in (slice(0, 3), slice(3, 8), slice(8, 11)):
        np.testing.assert_allclose(weights[:, rows].sum(axis=1), rows.stop - rows.start)
    assert not np.allclose(weights[:, 8], 1)
    # A single run has nothing to be exchanged with.
    np.testing.assert_array_equal(draw_weights(["a", "a", "b"], num_draws=40, seed=0)[:, 2], 1)


@pytest.mark.parametrize("runs", [2, 3, 7])
def test_the_variance_of_a_mean_is_not_too_small_with_few_seeds(runs: int) -> None:
    values = np.random.default_rng(0).standard_normal(runs)
    means = draw_weights(["a"] * runs, num_draws=40_000, seed=1) @ values / runs
    assert means.var() == pytest.approx(values.var(ddof=1) / runs, rel=0.05)


def test_percentiles_leave_a_fortieth_on_each_side() -> None:
    assert percentile_interval(np.arange(1001.0)) == pytest.approx((25, 975))


@pytest.mark.parametrize(("strata", "number"), [(["a"], 100), (["a", "b"], 39)])
def test_too_little_to_draw_from_is_refused(strata: list[str], number: int) -> None:
    with pytest.raises(FieldError):
        draw_weights(strata, num_draws=number, seed=0)


def test_points_without_a_size_are_stratified_by_parameters() -> None:
    points = Points.of([10, 10, 20], [1, 2, 3], [3, 2, 1])
    assert points.sizes.tolist() == ["10", "10", "20"]
