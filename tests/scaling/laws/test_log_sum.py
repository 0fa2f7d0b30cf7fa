"""The optimizer of all laws: its derivatives, and agreement with another optimizer."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, special

from sas_megatron.scaling.laws.log_sum import LogSumProblem, minimize


def draw_problem(delta: float) -> tuple[LogSumProblem, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(7)
    forms = generator.standard_normal((3, 17, 5))
    truth = generator.standard_normal(5) / 2
    problem = LogSumProblem(forms, np.zeros(17), delta)
    losses = problem.residuals(truth[None])[0] + 0.1 * generator.standard_normal(17)
    return LogSumProblem(forms, losses, delta), truth, generator.uniform(0.2, 2, 17)


@pytest.mark.parametrize("delta", [0.05, np.inf])
def test_derivatives_equal_finite_differences_of_the_objective(delta: float) -> None:
    problem, theta, weights = draw_problem(delta)
    found = problem.expand(theta[None], weights[None])
    step = 1e-6
    for parameter in range(5):
        moved = np.zeros(5)
        moved[parameter] = step
        up, down = (problem.expand((theta + sign * moved)[None], weights[None]) for sign in (1, -1))
        assert found.gradient[0, parameter] == pytest.approx(
            ((up.value - down.value) / (2 * step))[0], abs=1e-8
        )
        np.testing.assert_allclose(
            found.hessian[0, parameter], ((up.gradient - down.gradient) / (2 * step))[0], atol=1e-7
        )


def test_objective_is_the_sum_of_huber_losses() -> None:
    problem, theta, weights = draw_problem(0.05)
    residuals = problem.residuals(theta[None])[0]
    assert (np.abs(residuals) > 0.05).any()
    assert (np.abs(residuals) < 0.05).any()
    assert problem.expand(theta[None], weights[None]).value[0] == pytest.approx(
        float(weights @ special.huber(0.05, residuals)), rel=1e-13
    )


@pytest.mark.parametrize("delta", [0.05, np.inf])
def test_each_row_converges_to_a_minimum_for_its_weights(delta: float) -> None:
    problem, theta, weights = draw_problem(delta)
    rows = np.stack([weights, weights[::-1]])
    minima = minimize(problem, np.stack([theta, theta]), rows)
    for row, found, value in zip(rows, minima.theta, minima.value, strict=True):
        other = optimize.minimize(
            lambda x, row=row: problem.expand(x[None], row[None]).value[0],
            theta,
            jac=lambda x, row=row: problem.expand(x[None], row[None]).gradient[0],
            method="BFGS",
            options={"gtol": 1e-10},
        )
        assert value <= other.fun * (1 + 1e-10)
        np.testing.assert_allclose(problem.expand(found[None], row[None]).gradient, 0, atol=1e-8)


def test_frozen_parameters_are_unchanged_and_the_others_optimal() -> None:
    problem, theta, weights = draw_problem(np.inf)
    frozen = np.array([[False, False, False, True, False]])
    start = theta + 0.3
    minima = minimize(problem, start[None], weights[None], frozen_RP=frozen)
    assert minima.theta[0, 3] == start[3]
    gradient = problem.expand(minima.theta, weights[None]).gradient[0]
    assert np.abs(np.delete(gradient, 3)).max() < 1e-8 < abs(gradient[3])


def test_rows_are_independent() -> None:
    problem, theta, weights = draw_problem(0.05)
    starts = theta + np.random.default_rng(1).standard_normal((3600, 5)) / 5
    # More residuals than fit into one block.
    together = minimize(problem, starts, weights[None])
    for row in (0, 3528, 3529, 3599):
        alone = minimize(problem, starts[row : row + 1], weights[None])
        np.testing.assert_allclose(together.value[row], alone.value[0], rtol=1e-9)
