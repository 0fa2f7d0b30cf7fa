"""Do variants approach one irreducible loss? A likelihood-ratio test of shared against separate E.

Each of V variants has its own A, B, α, β; log losses are normal with one unknown spread. With RSS the least
sums of squares, −2 log Λ = n log(RSS_shared / RSS_separate). Its χ² holds for many points only. The same
statistic on another scale, F = (RSS_shared/RSS_separate − 1)(n − 5V)/(V − 1), has a known distribution at few
points too (exact where laws are linear).
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

# Five parameters a variant: log E, log A, log B, α, β, as `SumOfPowers` orders them.
PER_VARIANT = 5
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class SharedIrreducible:
    """The test's outcome; `separate` is E by variant, `shared` the one E of all, `statistic` −2 log Λ."""

    shared: float
    separate: dict[str, float]
    statistic: float
    degrees: tuple[int, int]
    p_value: float

    @property
    def differs(self) -> bool:
        """That separate irreducible losses fit better than chance explains, at 5 %."""
        return self.p_value < SIGNIFICANCE

    @property
    def text(self) -> str:
        """The outcome in a sentence."""
        each = ", ".join(f"{name} {value:.4f}" for name, value in self.separate.items())
        if self.differs:
            return f"The irreducible losses differ ({each}; p = {self.p_value:.2g})."
        return (
            f"The points do not tell the irreducible losses apart ({each}; p = {self.p_value:.2g}); "
            f"shared, it is {self.shared:.4f}."
        )


def compare_irreducible(by_variant: Mapping[str, Points]) -> SharedIrreducible:
    """Tests whether the variants' laws may share E.

    Raises:
        FieldError: a single variant, or one whose points cannot tell its law.
    """
    if len(by_variant) < 2:
        raise FieldError("variants", len(by_variant), "a comparison takes at least two", "add a variant")
    fits = {name: fit_surface(points, delta=np.inf) for name, points in by_variant.items()}
    separate = sum(fit.fit.objective for fit in fits.values())
    shared_loss, shared = _fit_shared(list(fits.values()))
    num_points = sum(len(points) for points in by_variant.values())
    degrees = (len(fits) - 1, num_points - PER_VARIANT * len(fits))
    # A shared E is a special case of separate ones: below them is rounding.
    ratio = max(shared / separate, 1.0) if separate > 0 else 1.0
    return SharedIrreducible(
        shared=shared_loss,
        separate={name: fit.surface.E for name, fit in fits.items()},
        statistic=float(num_points * np.log(ratio)),
        degrees=degrees,
        p_value=float(special.fdtrc(degrees[0], degrees[1], (ratio - 1) * degrees[1] / degrees[0])),
    )


def _fit_shared(fits: list[SurfaceFit]) -> tuple[float, float]:
    """E and half the sum of squares of the law with one E, from each variant's own E and from their mean."""
    problem = _join(fits)
    # Each fit's log E, log A and log B belong to losses about its own mean; here all losses are as they are.
    uncentred = [fit.fit.theta + fit.problem.log_loss.mean() * np.array([1, 1, 1, 0, 0]) for fit in fits]
    own_E = np.array([theta_P[0] for theta_P in uncentred])
    others = np.concatenate([theta_P[1:] for theta_P in uncentred])
    starts_RP = np.array([np.concatenate([[start], others]) for start in (own_E.mean(), *own_E)])
    minima = minimize(problem, starts_RP, np.ones((1, len(problem.log_loss))))
    lowest = int(minima.value.argmin())
    return float(np.exp(minima.theta[lowest, 0])), float(minima.value[lowest])


def _join(fits: list[SurfaceFit]) -> LogSumProblem:
    """All variants' points, with a parameter for the one log E and four for each variant."""
    own = PER_VARIANT - 1
    num_points = sum(len(fit.points) for fit in fits)
    forms_TIP = np.zeros((3, num_points, 1 + own * len(fits)))
    log_loss_I: FloatArray = np.zeros(num_points)
    first = 0
    for number, fit in enumerate(fits):
        rows = slice(first, first + len(fit.points))
        columns = slice(1 + own * number, 1 + own * (number + 1))
        forms_TIP[0, rows, 0] = 1
        forms_TIP[:, rows, columns] = fit.problem.problem.forms[:, :, 1:]
        log_loss_I[rows] = fit.problem.log_loss
        first = rows.stop
    return LogSumProblem(forms_TIP, log_loss_I, np.inf)
