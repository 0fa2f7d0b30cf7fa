"""The law: known surfaces are recovered, SciPy's optimum is reached, and invalid points are refused."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import optimize, special

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.loss_surface import (
    LossSurface,
    TokenCost,
    build_surface_problem,
    fit_surface,
    optimal_exponents,
    project_surface,
    surface_quantities,
)
from sas_megatron.scaling.laws.points import Points
from tests.scaling.synthetic import CHINCHILLA, draw_grid, draw_isoflops
from tests.selection import cases, exhaustive

OTHERS = [
    LossSurface(E=0.4, A=12.0, B=3000.0, alpha=0.15, beta=0.45),
    LossSurface(E=2.5, A=5000.0, B=60.0, alpha=0.55, beta=0.2),
]


@pytest.mark.parametrize("truth", [CHINCHILLA, *OTHERS], ids=["chinchilla", "wide", "narrow"])
def test_surface_without_noise_is_recovered(truth: LossSurface) -> None:
    points = draw_grid(0, noise=0, truth=truth)
    for fit in (fit_surface(points), fit_surface(points, delta=np.inf), project_surface(points)):
        assert dataclasses.astuple(fit.surface) == pytest.approx(dataclasses.astuple(truth), rel=1e-5)


def test_least_squares_agree_with_scipy_curve_fit() -> None:
    points = draw_grid(3, noise=0.004)
    log_params, log_tokens = np.log(points.params), np.log(points.tokens)
    at = (log_params - log_params.mean(), log_tokens - log_tokens.mean())

    def law(at, E, a, b, alpha, beta):  # type: ignore[no-untyped-def]
        return E + np.exp(a - alpha * at[0]) + np.exp(b - beta * at[1])

    tight = {"xtol": 1e-14, "ftol": 1e-14, "gtol": 1e-14, "maxfev": 20_000}
    start = [1.5, 0, 0, 0.3, 0.3]
    logs, _ = optimize.curve_fit(
        lambda *arguments: np.log(law(*arguments)), at, np.log(points.loss), p0=start, **tight
    )
    relative, _ = optimize.curve_fit(law, at, points.loss, p0=start, sigma=points.loss, **tight)
    for fit, expected in ((fit_surface(points, delta=np.inf), logs), (project_surface(points), relative)):
        found = fit.surface.E, fit.surface.alpha, fit.surface.beta
        assert found == pytest.approx((expected[0], expected[3], expected[4]), rel=1e-5)
        A = np.exp(expected[1] + expected[3] * log_params.mean())
        B = np.exp(expected[2] + expected[4] * log_tokens.mean())
        assert pytest.approx((A, B), rel=1e-4) == (fit.surface.A, fit.surface.B)


def reach_by_lbfgs(points: Points, *, every: int) -> float:
    """Return the lowest objective of SciPy's L-BFGS over every n-th of Hoffmann's 4,500 starting points."""
    log_params, log_tokens, log_loss = np.log(points.params), np.log(points.tokens), np.log(points.loss)

    def objective(theta):  # type: ignore[no-untyped-def]
        a, b, e, alpha, beta = theta
        terms = np.stack([a - alpha * log_params, b - beta * log_tokens, np.full(len(log_loss), e)])
        predicted = special.logsumexp(terms, axis=0)
        residuals = predicted - log_loss
        slopes = np.clip(residuals, -1e-3, 1e-3) * np.exp(terms - predicted)
        gradient = [slopes[0].sum(), slopes[1].sum(), slopes[2].sum()]
        gradient += [-(slopes[0] @ log_params), -(slopes[1] @ log_tokens)]
        return special.huber(1e-3, residuals).sum(), np.array(gradient)

    grid = itertools.product(
        range(0, 30, 5),
        range(0, 30, 5),
        np.arange(-1, 1.5, 0.5),
        np.arange(0, 2.5, 0.5),
        np.arange(0, 2.5, 0.5),
    )
    starts = [np.array(start, float) for start in grid]
    assert len(starts) == 4500
    options = {"ftol": 1e-15, "gtol": 1e-12, "maxiter": 3000, "maxfun": 20_000}
    # A stride that is coprime to the sides of the grid reaches all of its levels.
    return min(
        float(optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options).fun)
        for start in starts[::every]
    )


SURFACES = {
    "240 with outliers": draw_isoflops(0),
    "240, three times the noise": draw_isoflops(1, noise=0.03, outliers=12),
    "27": draw_grid(0, sizes=3, budgets=3, seeds=3),
    "12": draw_grid(2, sizes=4, budgets=3, seeds=1, noise=0.01),
    "60, other exponents": draw_grid(5, noise=0.01, truth=OTHERS[0]),
    # These have local minima far from the global one.
    "12, noise of 5 %": draw_grid(10, sizes=4, budgets=3, seeds=1, noise=0.05),
    "12, noise of 5 %, others": draw_grid(14, sizes=4, budgets=3, seeds=1, noise=0.05),
}


@pytest.mark.parametrize("every", [101, pytest.param(7, marks=exhaustive)])
@pytest.mark.parametrize(
    "name", cases(SURFACES, default=("240 with outliers", "60, other exponents", "12, noise of 5 %"))
)
def test_optimum_of_lbfgs_over_a_grid_of_starts_is_reached(name: str, every: int) -> None:
    points = SURFACES[name]
    reached = reach_by_lbfgs(points, every=every)
    assert build_surface_problem(points).fit().objective <= reached * (1 + 1e-9)


@exhaustive
@pytest.mark.timeout(3600)
def test_optimum_of_all_4500_starts_is_reached() -> None:
    points = draw_isoflops(2)
    assert fit_surface(points).fit.objective <= reach_by_lbfgs(points, every=1) * (1 + 1e-9)


def test_exponents_are_independent_of_units() -> None:
    points = draw_isoflops(4)
    assert points.flops is not None
    scaled = Points.of(
        points.params / 1e6, points.tokens / 1e9, points.loss / np.log(2), flops=points.flops / 1e18
    )
    fit, other = fit_surface(points), fit_surface(scaled)
    assert (other.surface.alpha, other.surface.beta) == pytest.approx(
        (fit.surface.alpha, fit.surface.beta), rel=1e-6
    )
    assert pytest.approx(fit.surface.E / np.log(2), rel=1e-6) == other.surface.E
    assert pytest.approx(fit.surface.A / np.log(2) / 1e6**fit.surface.alpha, rel=1e-5) == other.surface.A
    assert other.fit.objective == pytest.approx(fit.fit.objective, rel=1e-9)
    exponents = [
        optimal_exponents(surface_quantities(each.problem, each.fit.theta[None]), TokenCost.of(each.points))
        for each in (fit, other)
    ]
    for name, value in exponents[0].items():
        assert exponents[1][name] == pytest.approx(value, rel=1e-6)


def test_weight_of_two_equals_a_duplicated_point() -> None:
    points = draw_grid(1)
    weights = np.random.default_rng(0).integers(0, 3, len(points))
    fit = fit_surface(points)
    (weighted,) = fit.problem.exponents(fit.problem.refit(weights[None].astype(float), fit.fit))
    repeated = fit_surface(points.take(np.repeat(np.arange(len(points)), weights)))
    assert tuple(weighted) == pytest.approx((repeated.surface.alpha, repeated.surface.beta), rel=1e-6)


@pytest.mark.parametrize("exponent", [1.0, 0.9])
def test_optimum_has_the_lowest_loss_at_equal_flops(exponent: float) -> None:
    cost = TokenCost(7.5, exponent, "flops")
    best = CHINCHILLA.optimum(3e20, cost)
    assert cost.coefficient * best.params**exponent * best.tokens == pytest.approx(3e20)

    def loss(log_params: float) -> float:
        params = np.exp(log_params)
        return float(CHINCHILLA.predict(params, 3e20 / (cost.coefficient * params**exponent)))

    searched = optimize.minimize_scalar(loss, bounds=(15, 28), method="bounded", options={"xatol": 1e-10})
    assert np.log(best.params) == pytest.approx(searched.x, abs=1e-5)
    assert best.loss == pytest.approx(searched.fun)
    # The exponents are those with which the optimum changes.
    more = CHINCHILLA.optimum(3e21, cost)
    powers = optimal_exponents(
        {"alpha": np.array([CHINCHILLA.alpha]), "beta": np.array([CHINCHILLA.beta])}, cost
    )
    assert np.log10(more.params / best.params) == pytest.approx(powers["params_exponent"][0])
    assert np.log10(more.tokens / best.tokens) == pytest.approx(powers["tokens_exponent"][0])
    excess = (best.loss - CHINCHILLA.E) / (more.loss - CHINCHILLA.E)
    assert np.log10(excess) == pytest.approx(powers["loss_exponent"][0])


def test_cost_per_token_is_fitted_to_the_recorded_flops() -> None:
    points = draw_grid(0)
    attention = dataclasses.replace(points, flops=40 * points.params**0.91 * points.tokens)
    assert dataclasses.astuple(TokenCost.of(attention)) == pytest.approx((40, 0.91, "flops"))
    with pytest.raises(FieldError, match="FLOPs per token must grow with params; correct the column"):
        TokenCost.of(dataclasses.replace(points, flops=1e15 * points.tokens / points.params))
    without = dataclasses.replace(points, flops=None)
    assert TokenCost.of(without) == TokenCost(6.0, 1.0, "6ND")


def along(loss: list[float], *, params: list[float], tokens: list[float]) -> Points:
    return Points.of(params, tokens, loss)


SIZES, BUDGETS = [1e7, 3e7, 9e7], [1e9, 4e9, 16e9]
GRID = {"params": SIZES * 3, "tokens": [tokens for tokens in BUDGETS for _ in range(3)]}


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (
            along([3.0, 2.9], params=SIZES[:2], tokens=BUDGETS[:2]),
            "points=2: the law has five parameters and needs at least 6 points; add runs",
        ),
        (
            along([3.0] * 9, params=[1e7, 1.001e7, 1e7] * 3, tokens=GRID["tokens"]),
            "params=1 value: the law needs at least 3 values that differ by more than 1%; add sizes",
        ),
        (
            along([3.0] * 9, params=GRID["params"], tokens=[1e9, 4e9, 4e9] * 3),
            "tokens=2 values: the law needs at least 3 values that differ by more than 1%; add token budgets",
        ),
        (
            along([3.0] * 9, params=GRID["params"], tokens=[20 * size for size in SIZES] * 3),
            "tokens=a power of params: N and D must vary independently, since A/N^α and B/D^β cannot "
            "be separated otherwise; train a size on several token budgets",
        ),
    ],
    ids=["two points", "one size", "two token budgets", "tokens by size"],
)
def test_points_that_do_not_determine_the_law_are_refused(points: Points, message: str) -> None:
    for fit in (fit_surface, project_surface):
        with pytest.raises(FieldError) as caught:
            fit(points)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda n, d: 2 + n * 1e-8 + 50 / d**0.2, "does not decrease with params"),
        (lambda n, d: 2 + 50 / n**0.3 + d * 1e-11, "does not decrease with tokens"),
        (lambda n, d: 2 + (n < 2e7) + 50 / d**0.2, "the fitted exponent of params exceeds 5"),
    ],
    ids=["rises with size", "rises with tokens", "a step"],
)
def test_losses_that_do_not_decrease_are_refused(loss, message: str) -> None:  # type: ignore[no-untyped-def]
    params, tokens = np.array(GRID["params"]), np.array(GRID["tokens"])
    with pytest.raises(FieldError, match=message):
        fit_surface(Points.of(params, tokens, loss(params, tokens)))
