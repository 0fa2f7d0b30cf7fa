"""IsoFLOP profiles of exact parabolas, of noisy runs, and of wide profiles of the law."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import optimize, stats

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.isoflop import fit_isoflop, group_budgets
from sas_megatron.scaling.laws.points import Points
from tests.scaling.synthetic import CHINCHILLA
from tests.selection import draws

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
    assert found.params_interval == pytest.approx((0.46, 0.46))
    profile = found.profiles[0]
    assert profile.curvature == pytest.approx(0.05)
    # The five sizes nearest the minimum, of seven; the sizes are 1.1 times those of the minimum.
    assert (profile.smallest, profile.largest) == pytest.approx(1.1 * profile.params * SIZES[[1, 5]])


@draws(100, 1000)
def test_intervals_have_their_nominal_coverage(num_draws: int) -> None:
    held = 0
    for seed in range(num_draws):
        interval = fit_isoflop(valleys(noise=0.003, seed=seed)).params_interval
        assert interval is not None
        held += interval[0] <= 0.46 <= interval[1]
    fewest, most = stats.binom.interval(0.999, num_draws, 0.95)
    assert fewest <= held <= most


def test_exponents_and_intervals_are_independent_of_units() -> None:
    points = valleys(noise=0.003)
    scaled = dataclasses.replace(
        points,
        params=points.params / 1e9,
        tokens=points.tokens / 1e12,
        flops=np.asarray(points.flops) / 1e18,
        loss=points.loss / np.log(2),
    )
    found, other = fit_isoflop(points), fit_isoflop(scaled)
    assert other.params_exponent == pytest.approx(found.params_exponent)
    assert other.params_interval == pytest.approx(found.params_interval)
    assert other.tokens_interval == pytest.approx(found.tokens_interval)


def test_interval_of_a_line_through_two_budgets_is_unknown() -> None:
    points = valleys()
    assert fit_isoflop(points.take(points.compute < 1e19)).params_interval is None


def test_exponent_of_wide_profiles_is_that_of_the_law() -> None:
    # The largest budget begins at a tenth of its best size, and smaller budgets have the same sizes, so that
    # their profiles end far above their best size, as those of Porian et al. 2024 (arXiv 2406.19146) do.
    sizes = np.geomspace(1e8, 1e12, 24)
    flops = np.repeat(BUDGETS, len(sizes))
    params = np.tile(sizes, len(BUDGETS))
    tokens = flops / 6 / params
    points = Points.of(params, tokens, CHINCHILLA.predict(params, tokens), flops=flops)
    expected = CHINCHILLA.beta / (CHINCHILLA.alpha + CHINCHILLA.beta)
    assert fit_isoflop(points).params_exponent == pytest.approx(expected, abs=0.03)
    vertices = [
        -linear / 2 / square
        for square, linear, _ in (
            np.polyfit(np.log(params[flops == budget]), points.loss[flops == budget], 2) for budget in BUDGETS
        )
    ]
    assert abs(np.polyfit(np.log(BUDGETS), vertices, 1)[0] - expected) > 0.03, "one parabola is biased"


def test_minimum_of_a_wide_profile_is_that_of_the_law() -> None:
    flops = np.repeat(BUDGETS, 17)
    # From a tenth to a thousand times the optimum, as if the small budgets reused the sizes of the large.
    params = np.tile(np.geomspace(0.1, 1000, 17), len(BUDGETS)) * np.sqrt(flops / 120)
    tokens = flops / 6 / params
    points = Points.of(params, tokens, CHINCHILLA.predict(params, tokens), flops=flops)
    for profile in fit_isoflop(points).profiles:

        def loss(log_params: float, flops: float = profile.flops) -> float:
            size = np.exp(log_params)
            return float(CHINCHILLA.predict(size, flops / 6 / size))

        searched = optimize.minimize_scalar(loss, bounds=(10, 30), method="bounded")
        assert np.log(profile.params) == pytest.approx(searched.x, abs=0.1)


def test_budget_with_its_minimum_outside_the_sizes_is_excluded() -> None:
    points = valleys()
    small = (points.compute > 9e20) & (points.params > 0.2 * 0.1 * BUDGETS[-1] ** 0.46 * 4)
    found = fit_isoflop(points.take(~small))
    assert (len(found.profiles), found.without_minimum) == (4, 1)
    assert found.params_exponent == pytest.approx(0.46)


def test_nominal_budgets_that_differ_by_rounding_are_one_profile() -> None:
    generator = np.random.default_rng(0)
    flops = np.repeat(BUDGETS, 12) * np.exp(generator.uniform(-0.1, 0.1, 12 * len(BUDGETS)))
    groups = group_budgets(flops)
    assert [group.tolist() for group in groups] == [
        list(range(first, first + 12)) for first in range(0, len(flops), 12)
    ]


def test_runs_between_the_budgets_are_in_no_profile_and_counted() -> None:
    points = valleys()
    between = dataclasses.replace(points, flops=np.asarray(points.flops) * 1.7).take(np.arange(2))
    both = Points.of(
        *(
            np.concatenate([getattr(points, name), getattr(between, name)])
            for name in ("params", "tokens", "loss")
        ),
        flops=np.concatenate([points.compute, between.compute]),
    )
    found = fit_isoflop(both)
    assert len(found.profiles) == 5
    assert found.params_exponent == pytest.approx(0.46)
    evenly = np.geomspace(1e18, 1e19, 500)
    assert len(group_budgets(evenly)) <= 1


def test_every_budget_of_the_chinchilla_runs_is_one_group() -> None:
    # FLOPs that were read from a figure scatter around nine budgets, and some runs are between them, as in
    # the table of Besiroglu et al. 2024 (arXiv 2404.10102).
    generator = np.random.default_rng(2)
    nominal = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
    around = np.repeat(nominal, 16) * np.exp(0.06 * generator.standard_normal(16 * 9))
    between = np.exp(generator.uniform(np.log(6e18), np.log(3e21), 30))
    groups = [group for group in group_budgets(np.concatenate([around, between])) if len(group) >= 8]
    assert [np.median(around[group[group < len(around)]]) for group in groups] == pytest.approx(
        nominal, rel=0.06
    )


def test_runs_without_profiles_are_refused() -> None:
    points = valleys()
    with pytest.raises(FieldError, match="isoFLOP profiles=1: needs 2 budgets"):
        fit_isoflop(points.take(points.compute < 2e18))
