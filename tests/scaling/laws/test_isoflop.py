"""IsoFLOP profiles of exact parabolas and of noisy runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.isoflop import fit_isoflop, group_budgets
from sas_megatron.scaling.laws.points import Points
from sas_megatron.scaling.laws.resampling import draw_weights

BUDGETS = np.geomspace(1e18, 1e21, 5)
SIZES = np.geomspace(0.25, 4, 7)


def valleys(*, noise: float = 0.0, power: float = 0.46, seed: int = 0) -> Points:
    """Return points on an exact parabola in log N for each budget, with the minimum at 0.1 C^power."""
    flops = np.repeat(BUDGETS, len(SIZES))
    best = 0.1 * flops**power
    params = best * np.tile(SIZES, len(BUDGETS)) * 1.1
    loss = 3 - 0.2 * np.log10(flops / 1e18) + 0.05 * np.log(params / best) ** 2
    loss += noise * np.random.default_rng(seed).standard_normal(len(flops))
    sizes = [f"s{number}" for number in range(len(SIZES))] * len(BUDGETS)
    return Points.of(params, flops / 6 / params, loss, flops=flops, sizes=sizes)


def test_exact_parabolas_are_recovered() -> None:
    found = fit_isoflop(valleys())
    assert [profile.params for profile in found.profiles] == pytest.approx(0.1 * BUDGETS**0.46, rel=1e-8)
    assert [profile.tokens for profile in found.profiles] == pytest.approx(BUDGETS**0.54 / 0.6, rel=1e-8)
    assert [profile.loss for profile in found.profiles] == pytest.approx(3 - 0.2 * np.log10(BUDGETS / 1e18))
    assert (found.params_exponent, found.tokens_exponent) == pytest.approx((0.46, 0.54))
    assert found.params_interval is None


def test_intervals_cover_the_exponent_and_are_independent_of_units() -> None:
    held = 0
    for seed in range(40):
        points = valleys(noise=0.003, seed=seed)
        weights = draw_weights(points.sizes.tolist(), num_draws=100, seed=seed)
        interval = fit_isoflop(points, weights_RI=weights).params_interval
        assert interval is not None
        held += interval[0] <= 0.46 <= interval[1]
    assert held >= 33  # of 40 at 95 %; fewer with a probability of 0.1 %
    scaled = dataclasses.replace(points, flops=np.asarray(points.flops) / 1e18, loss=points.loss / np.log(2))
    assert fit_isoflop(scaled).params_exponent == pytest.approx(fit_isoflop(points).params_exponent)


def test_budget_with_its_minimum_outside_the_sizes_is_excluded() -> None:
    points = valleys()
    small = (points.compute > 9e20) & (points.params > 0.2 * 0.1 * BUDGETS[-1] ** 0.46 * 4)
    found = fit_isoflop(points.take(~small))
    assert (len(found.profiles), found.without_minimum) == (4, 1)
    assert found.params_exponent == pytest.approx(0.46)


def test_runs_within_a_tenth_form_a_budget() -> None:
    groups = group_budgets(np.array([1.0, 5.0, 1.05, 5.4, 1.2]))
    assert [group.tolist() for group in groups] == [[0, 2], [4], [1, 3]]


def test_runs_without_profiles_are_refused() -> None:
    points = valleys()
    with pytest.raises(FieldError, match="isoFLOP profiles=1: needs 2 budgets"):
        fit_isoflop(points.take(points.compute < 2e18))
