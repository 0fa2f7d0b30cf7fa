"""Power law L(C) = E + K/C^γ of the loss over parameters, tokens, FLOPs or seconds, with or without E.

With E: Hestness et al. 2017 (arXiv 1712.00409, section 3); without: Kaplan et al. 2020 (arXiv 2001.08361,
equation 1.3). Fitted by Huber loss on log residuals, as the surface.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import HUBER_DELTA, BoolArray, FloatArray
from sas_megatron.scaling.laws.points import count_levels
from sas_megatron.scaling.laws.sum_of_powers import NEGLIGIBLE_SHARE, Fit, SumOfPowers


@dataclass(frozen=True)
class PowerLaw:
    """Parameters of the law, in the units of the data; E is 0 for a law without irreducible loss.

    They may also be arrays with one value per bootstrap draw.
    """

    E: float | FloatArray
    K: float | FloatArray
    gamma: float | FloatArray

    def predict(self, spent: float | FloatArray) -> FloatArray:
        """Return the loss at the amount spent."""
        loss: FloatArray = np.asarray(self.E + self.K * np.asarray(spent) ** -np.asarray(self.gamma))
        return loss

    def spend_for(self, loss: float | FloatArray) -> FloatArray:
        """Return the amount needed for a loss; infinite if the loss is not above E."""
        above = np.asarray(loss) - self.E
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            spent = (np.maximum(above, 0) / self.K) ** (-1 / np.asarray(self.gamma))
        return np.asarray(np.where(above > 0, spent, np.inf))


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted power law, with the problem and parameters from which `refit` starts."""

    law: PowerLaw
    objective: float
    problem: SumOfPowers
    fit: Fit

    @property
    def is_distinct(self) -> bool:
        """Whether the law differs from one without E: its E, if it has one, is not negligible."""
        lowest = float(np.exp(self.problem.log_loss.min()))
        return not self.problem.irreducible or float(self.law.E) >= NEGLIGIBLE_SHARE * lowest

    def refit(self, weights_RI: FloatArray) -> PowerLaw:
        """Return the laws for rows of weights, as arrays."""
        return _natural(self.problem, self.problem.refit(weights_RI, self.fit))


def fit_power_law(
    spent: FloatArray,
    loss: FloatArray,
    *,
    irreducible: bool,
    delta: float = HUBER_DELTA,
) -> PowerLawFit:
    """Fit the law to losses.

    Args:
        spent: Parameters, tokens, FLOPs or seconds of each run.
        loss: Loss of each run.
        irreducible: Whether the law has a parameter E.
        delta: Parameter of the Huber loss.

    Raises:
        FieldError: There are fewer distinct amounts than parameters, or the loss does not decrease.
    """
    needed = 3 if irreducible else 2
    levels = count_levels(np.asarray(spent)) if len(spent) else 0
    if levels < needed:
        raise FieldError(
            "amounts spent",
            levels,
            f"a power law needs at least {needed} distinct values",
            "add runs with other amounts",
        )
    problem = SumOfPowers.of([spent], loss, irreducible=irreducible, delta=delta)
    fit = problem.fit()
    law = _natural(problem, fit.theta[None])
    single = PowerLaw(*(float(np.asarray(value)[0]) for value in (law.E, law.K, law.gamma)))
    if not np.asarray(single.gamma) > 0:
        raise FieldError(
            "amounts spent",
            levels,
            "the loss does not decrease with the amount spent",
            "check for diverged runs",
        )
    return PowerLawFit(single, fit.objective, problem, fit)


def find_frontier(spent: FloatArray, loss: FloatArray) -> BoolArray:
    """Return a mask of the Pareto frontier: runs whose loss is below that of all runs of at most equal cost.

    Of several runs with equal cost and loss, the first is on the frontier.
    """
    order = np.lexsort((np.asarray(loss), np.asarray(spent)))
    ascending = np.asarray(loss)[order]
    frontier = np.zeros(len(order), dtype=bool)
    lowest_before = np.minimum.accumulate(np.concatenate([[np.inf], ascending[:-1]]))
    frontier[order] = ascending < lowest_before
    return frontier


def _natural(problem: SumOfPowers, theta_RP: FloatArray) -> PowerLaw:
    coefficients_RT = problem.coefficients(theta_RP)
    irreducible = coefficients_RT[:, 0] if problem.irreducible else np.zeros(len(theta_RP))
    return PowerLaw(irreducible, coefficients_RT[:, -1], problem.exponents(theta_RP)[:, 0])
