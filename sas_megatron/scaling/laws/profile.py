"""Profile-likelihood intervals of single parameters.

Residuals of log losses are assumed normal with one unknown variance. With RSS the minimum sum of squares at a
fixed value of the parameter, the interval contains the values with RSS/RSS_min ≤ 1 + F(1, n − 5)/(n − 5): the
likelihood-ratio interval with the F distribution instead of χ², which is exact for a linear law (Bates and
Watts 1988, Nonlinear Regression Analysis, section 6.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import special

from sas_megatron.scaling.laws.log_sum import FloatArray, minimize
from sas_megatron.scaling.laws.loss_surface import SurfaceFit, surface_quantities
from sas_megatron.scaling.laws.resampling import LEVEL

# Indices among log E, log A, log B, α, β. A and B refer to centred logarithms and are not profiled.
PROFILED = {"E": 0, "alpha": 3, "beta": 4}
# Initial step in standard errors, doubled until the limit is passed; the interval is open beyond the last.
FIRST_STEP, NUM_DOUBLINGS = 1.0, 8
NUM_BISECTIONS = 26

OpenInterval = tuple[float | None, float | None]


def profile_intervals(least_squares: SurfaceFit, *, level: float = LEVEL) -> dict[str, OpenInterval]:
    """Return the intervals of E, α and β around a least-squares fit; None is an end that is not determined.

    An undetermined lower end of E is 0.
    """
    names = list(PROFILED)
    indices = [PROFILED[name] for name in names]
    ends = {sign: _find_ends(least_squares, indices, sign=sign, level=level) for sign in (-1, 1)}
    intervals: dict[str, OpenInterval] = {}
    for number, name in enumerate(names):
        low, high = (
            None if np.isnan(ends[sign][number]) else _natural(least_squares, name, float(ends[sign][number]))
            for sign in (-1, 1)
        )
        intervals[name] = (0.0 if name == "E" and low is None else low, high)
    return intervals


def max_relative_increase(num_points: int, num_parameters: int, *, level: float = LEVEL) -> float:
    """Return the largest relative increase of the sum of squares within the interval of one parameter."""
    degrees = num_points - num_parameters
    return float(special.fdtri(1, degrees, level) / degrees)


def _natural(fit: SurfaceFit, name: str, value: float) -> float:
    theta_1P = fit.fit.theta[None].copy()
    theta_1P[0, PROFILED[name]] = value
    return float(surface_quantities(fit.problem, theta_1P)[name][0])


def _find_ends(fit: SurfaceFit, indices: Sequence[int], *, sign: int, level: float) -> FloatArray:
    """Return the values at which the profile passes its limit on one side; NaN if it stays below it."""
    problem, best_P = fit.problem.problem, fit.fit.theta
    weights_1I = np.ones((1, len(fit.points)))
    limit = fit.fit.objective * (1 + max_relative_increase(len(fit.points), len(best_P), level=level))
    hessian_PP = problem.expand(best_P[None], weights_1I).hessian[0]
    variance = 2 * fit.fit.objective / (len(fit.points) - len(best_P))
    errors_P = np.sqrt(variance * np.maximum(np.diag(np.linalg.pinv(hessian_PP)), 0))
    rows = np.arange(len(indices))
    frozen_RP = np.zeros((len(rows), len(best_P)), bool)
    frozen_RP[rows, indices] = True

    def compute_excess(distance_R: FloatArray, starts_RP: FloatArray) -> tuple[FloatArray, FloatArray]:
        starts_RP = starts_RP.copy()
        starts_RP[rows, indices] = best_P[indices] + sign * distance_R
        minima = minimize(problem, starts_RP, weights_1I, frozen_RP=frozen_RP)
        return minima.value - limit, minima.theta

    inside_R, outside_R = np.zeros(len(rows)), FIRST_STEP * errors_P[list(indices)]
    theta_RP = np.tile(best_P, (len(rows), 1))
    passed = np.zeros(len(rows), bool)
    for _ in range(NUM_DOUBLINGS):
        excess_R, found_RP = compute_excess(outside_R, theta_RP)
        passed |= excess_R > 0
        if passed.all():
            break
        inside_R = np.where(passed, inside_R, outside_R)
        theta_RP = np.where(passed[:, None], theta_RP, found_RP)
        outside_R = np.where(passed, outside_R, 2 * outside_R)
    for _ in range(NUM_BISECTIONS):
        middle_R = (inside_R + outside_R) / 2
        excess_R, found_RP = compute_excess(middle_R, theta_RP)
        inside = excess_R <= 0
        inside_R, outside_R = np.where(inside, middle_R, inside_R), np.where(inside, outside_R, middle_R)
        theta_RP = np.where(inside[:, None], found_RP, theta_RP)
    ends: FloatArray = np.where(passed, best_P[list(indices)] + sign * outside_R, np.nan)
    return ends
