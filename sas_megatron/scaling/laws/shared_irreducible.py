"""Likelihood-ratio test of one irreducible loss E for all variants against a separate E for each.

Each of V variants has its own A, B, α, β; log losses are normal with one unknown variance. With RSS the
minimum sum of squares, −2 log Λ = n log(RSS_shared / RSS_separate), which has a χ² distribution for many
points only. The equivalent statistic F = (RSS_shared/RSS_separate − 1)(n − 5V)/(V − 1) has an F distribution
for few points as well (exact for linear laws).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import FloatArray, LogSumProblem, minimize
from sas_megatron.scaling.laws.loss_surface import SurfaceFit, fit_surface
from sas_megatron.scaling.laws.points import Points

# Parameters per variant: log E, log A, log B, α, β, in the order of `SumOfPowers`.
PER_VARIANT = 5
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class SharedIrreducible:
    """Result of the test: the shared E, the separate E by variant, and the statistic −2 log Λ."""

    shared: float
    separate: dict[str, float]
    statistic: float
    degrees: tuple[int, int]
    p_value: float

    @property
    def differs(self) -> bool:
        """Whether the irreducible losses differ at the 5 % level."""
        return self.p_value < SIGNIFICANCE

    @property
    def text(self) -> str:
        """The result as a sentence."""
        each = ", ".join(f"{name} {value:.4f}" for name, value in self.separate.items())
        if self.differs:
            return f"The irreducible losses differ ({each}; p = {self.p_value:.2g})."
        return (
            f"The irreducible losses do not differ significantly ({each}; p = {self.p_value:.2g}); "
            f"the shared value is {self.shared:.4f}."
        )


def compare_irreducible(by_variant: Mapping[str, Points]) -> SharedIrreducible:
    """Test whether the laws of several variants have the same E.

    Raises:
        FieldError: There is only one variant, or a law cannot be fitted to the points of one.
    """
    if len(by_variant) < 2:
        raise FieldError("variants", len(by_variant), "a comparison needs at least two", "add a variant")
    fits = {name: fit_surface(points, delta=np.inf) for name, points in by_variant.items()}
    separate = sum(fit.fit.objective for fit in fits.values())
    shared_loss, shared = _fit_shared(list(fits.values()))
    num_points = sum(len(points) for points in by_variant.values())
    degrees = (len(fits) - 1, num_points - PER_VARIANT * len(fits))
    # A shared E is a special case of separate ones; a ratio below 1 is a rounding error.
    ratio = max(shared / separate, 1.0) if separate > 0 else 1.0
    return SharedIrreducible(
        shared=shared_loss,
        separate={name: fit.surface.E for name, fit in fits.items()},
        statistic=float(num_points * np.log(ratio)),
        degrees=degrees,
        p_value=float(special.fdtrc(degrees[0], degrees[1], (ratio - 1) * degrees[1] / degrees[0])),
    )


def _fit_shared(fits: list[SurfaceFit]) -> tuple[float, float]:
    """Return E and half the sum of squares of the law with a shared E.

    The starting points are the E of each variant and their mean.
    """
    problem = _join(fits)
    # The log E, log A and log B of each fit refer to losses relative to its mean; here losses are absolute.
    uncentred = [fit.fit.theta + fit.problem.log_loss.mean() * np.array([1, 1, 1, 0, 0]) for fit in fits]
    separate_E = np.array([theta_P[0] for theta_P in uncentred])
    others = np.concatenate([theta_P[1:] for theta_P in uncentred])
    starts_RP = np.array([np.concatenate([[start], others]) for start in (separate_E.mean(), *separate_E)])
    minima = minimize(problem, starts_RP, np.ones((1, len(problem.log_loss))))
    lowest = int(minima.value.argmin())
    return float(np.exp(minima.theta[lowest, 0])), float(minima.value[lowest])


def _join(fits: list[SurfaceFit]) -> LogSumProblem:
    """Return the problem of all points, with one parameter for log E and four for each variant."""
    count = PER_VARIANT - 1
    num_points = sum(len(fit.points) for fit in fits)
    forms_TIP = np.zeros((3, num_points, 1 + count * len(fits)))
    log_loss_I: FloatArray = np.zeros(num_points)
    first = 0
    for number, fit in enumerate(fits):
        rows = slice(first, first + len(fit.points))
        columns = slice(1 + count * number, 1 + count * (number + 1))
        forms_TIP[0, rows, 0] = 1
        forms_TIP[:, rows, columns] = fit.problem.problem.forms[:, :, 1:]
        log_loss_I[rows] = fit.problem.log_loss
        first = rows.stop
    return LogSumProblem(forms_TIP, log_loss_I, np.inf)
