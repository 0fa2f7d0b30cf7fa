"""L(C) = E + K/C^γ, with the irreducible loss E or without: loss along one axis of spending.

Hestness et al. 2017 (arXiv 1712.00409, section 3) with E, Kaplan et al. 2020 (arXiv 2001.08361, equation 1.3)
without; fitted like the surface, by Huber loss on log residuals.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import HUBER_DELTA, BoolArray, FloatArray
from sas_megatron.scaling.laws.points import count_levels
from sas_megatron.scaling.laws.sum_of_powers import Fit, SumOfPowers


@dataclass(frozen=True)
class PowerLaw:
    """The numbers of the law, in the units of what it was fitted to; E is 0 where there is none.

    Each may also be an array, of one law for each draw of a bootstrap.
    """

    E: float | FloatArray
    K: float | FloatArray
    gamma: float | FloatArray

    def predict(self, spent: float | FloatArray) -> FloatArray:
        """The loss at what was spent."""
        loss: FloatArray = np.asarray(self.E + self.K * np.asarray(spent) ** -np.asarray(self.gamma))
        return loss

    def spend_for(self, loss: float | FloatArray) -> FloatArray:
        """What has to be spent for a loss; infinite where it is not above E."""
        above = np.asarray(loss) - self.E
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            spent = (np.maximum(above, 0) / self.K) ** (-1 / np.asarray(self.gamma))
        return np.asarray(np.where(above > 0, spent, np.inf))


@dataclass(frozen=True)
class PowerLawFit:
    """A fitted power law, and the problem and parameters that other weights start from."""

    law: PowerLaw
    objective: float
    problem: SumOfPowers
    fit: Fit

    def refit(self, weights_RI: FloatArray) -> PowerLaw:
        """The law for each row of weights, as arrays."""
        return _natural(self.problem, self.problem.refit(weights_RI, self.fit))


def fit_power_law(
    spent: FloatArray,
    loss: FloatArray,
    *,
    irreducible: bool,
    delta: float = HUBER_DELTA,
) -> PowerLawFit:
    """Fits the law to losses at parameters, tokens, FLOPs or seconds spent.

    Raises:
        FieldError: fewer different values than the law has numbers, or losses that do not fall.
    """
    needed = 3 if irreducible else 2
    levels = count_levels(np.asarray(spent)) if len(spent) else 0
    if levels < needed:
        raise FieldError(
            "amounts spent",
            levels,
            f"a power law needs at least {needed} that differ",
            "add runs that spend other amounts",
        )
    problem = SumOfPowers.of([spent], loss, irreducible=irreducible, delta=delta)
    fit = problem.fit()
    law = _natural(problem, fit.theta[None])
    single = PowerLaw(*(float(np.asarray(value)[0]) for value in (law.E, law.K, law.gamma)))
    if not np.asarray(single.gamma) > 0:
        raise FieldError(
            "amounts spent",
            levels,
            "the loss does not fall with what is spent",
            "look for runs that diverged",
        )
    return PowerLawFit(single, fit.objective, problem, fit)


def find_frontier(spent: FloatArray, loss: FloatArray) -> BoolArray:
    """Which runs no other beats with less or equal spending."""
    cheaper = spent[:, None] <= spent[None, :]
    better = loss[:, None] < loss[None, :]
    frontier: BoolArray = np.asarray(~(cheaper & better).any(axis=0))
    return frontier


def _natural(problem: SumOfPowers, theta_RP: FloatArray) -> PowerLaw:
    coefficients_RT = problem.coefficients(theta_RP)
    irreducible = coefficients_RT[:, 0] if problem.irreducible else np.zeros(len(theta_RP))
    return PowerLaw(irreducible, coefficients_RT[:, -1], problem.exponents(theta_RP)[:, 0])
