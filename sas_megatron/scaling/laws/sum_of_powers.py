"""L = E + Σ_j K_j / x_j^p_j on given points: starts by variable projection, minima by Newton.

regressors, losses -> logarithms about their means -> grid of exponents, coefficients projected
  -> the best of the grid and some far from it, each to its minimum -> the lowest

Means are taken off first, so that units of loss, parameters, tokens and FLOPs change no exponent.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sas_megatron.scaling.laws.log_sum import HUBER_DELTA, FloatArray, LogSumProblem, minimize
from sas_megatron.scaling.laws.projection import project

# Exponents of published laws lie between 0.05 and 0.8 (Kaplan et al. 2020, Hoffmann et al. 2022).
GRID_EXPONENTS = np.geomspace(0.02, 3.0, 20)
NUM_STARTS = 32
# By number of regressors, every combination of exponents.
_EXPONENT_GRIDS = {count: np.array(list(itertools.product(GRID_EXPONENTS, repeat=count))) for count in (1, 2)}
# The steps of `fit_projected`, as logarithms of ratios of exponents, and how many grids it may take.
FINEST_RATIO, MAX_REFINEMENTS = 1e-9, 400
# Where the projection makes a term zero, Newton starts it at this share of the mean loss: it can grow.
SMALLEST_START = 1e-2


class Fit(NamedTuple):
    """Parameters (log coefficients, then exponents, of centred logarithms), and the objective there."""

    theta: FloatArray
    objective: float


@dataclass(frozen=True)
class SumOfPowers:
    """The law on its points: logarithms of J regressors at I points, `log_x` (J, I), and of losses (I)."""

    log_x: FloatArray
    log_loss: FloatArray
    irreducible: bool = True
    delta: float = HUBER_DELTA

    @staticmethod
    def of(
        regressors: Sequence[FloatArray],
        loss: FloatArray,
        *,
        irreducible: bool = True,
        delta: float = HUBER_DELTA,
    ) -> SumOfPowers:
        """From positive values as they were measured."""
        return SumOfPowers(
            np.log(np.stack([np.asarray(values, float) for values in regressors])),
            np.log(np.asarray(loss, float)),
            irreducible,
            delta,
        )

    @property
    def num_terms(self) -> int:
        """Regressors, and the irreducible loss if there is one."""
        return len(self.log_x) + self.irreducible

    @property
    def num_parameters(self) -> int:
        """A coefficient for each term, and an exponent for each regressor."""
        return self.num_terms + len(self.log_x)

    @functools.cached_property
    def problem(self) -> LogSumProblem:
        """The terms as linear forms in the parameters."""
        num_points = len(self.log_loss)
        forms_TIP = np.zeros((self.num_terms, num_points, self.num_parameters))
        for term in range(self.num_terms):
            forms_TIP[term, :, term] = 1
        for number, centred_I in enumerate(self._centred_x):
            forms_TIP[number + self.irreducible, :, self.num_terms + number] = -centred_I
        return LogSumProblem(forms_TIP, self.log_loss - self.log_loss.mean(), self.delta)

    def fit(self) -> Fit:
        """The lowest minimum found from a grid of starts."""
        ones_1I = np.ones((1, len(self.log_loss)))
        starts_1GP, squares_1G = self._grid_starts(ones_1I)
        # By rank, densely at the best and thinly over the rest of the grid.
        ranks = np.unique(np.geomspace(1, starts_1GP.shape[1], NUM_STARTS).round().astype(int)) - 1
        starts_RP = starts_1GP[0, np.argsort(squares_1G[0])[ranks]]
        minima = minimize(self.problem, starts_RP, ones_1I)
        lowest = int(minima.value.argmin())
        return Fit(minima.theta[lowest], float(minima.value[lowest]))

    def refit(self, weights_RI: FloatArray, fit: Fit) -> FloatArray:
        """Parameters (R, P) for other weights; rows start from `fit` and from their own best grid point."""
        starts_RGP, squares_RG = self._grid_starts(weights_RI)
        rows = np.arange(len(weights_RI))
        starts = np.concatenate(
            [np.tile(fit.theta, (len(rows), 1)), starts_RGP[rows, squares_RG.argmin(axis=1)]]
        )
        minima = minimize(self.problem, starts, np.concatenate([weights_RI, weights_RI]))
        first, second = minima.value.reshape(2, -1)
        halves = minima.theta.reshape(2, len(rows), -1)
        theta_RP: FloatArray = np.where((first <= second)[:, None], halves[0], halves[1])
        return theta_RP

    def fit_projected(self) -> Fit:
        """The law by variable projection alone: least squares of relative residuals, Σ (1 − L̂/L)².

        The grid's best exponents become the middle of a finer one, until its steps are rounding.
        """
        ones_1I = np.ones((1, len(self.log_loss)))
        _, squares_1G = project(self._relative_terms(_EXPONENT_GRIDS[len(self.log_x)]), ones_1I)
        centre_J = _EXPONENT_GRIDS[len(self.log_x)][squares_1G[0].argmin()]
        offsets_GJ = np.array(list(itertools.product(range(-2, 3), repeat=len(centre_J))))
        ratio = float(np.log(GRID_EXPONENTS[1] / GRID_EXPONENTS[0]))
        for _ in range(MAX_REFINEMENTS):
            exponents_GJ = centre_J * np.exp(offsets_GJ * ratio)
            terms_GIT = self._relative_terms(exponents_GJ)
            coefficients_GT = project(terms_GIT, ones_1I).coefficients[0]
            # From the residuals themselves: the difference of sums would end at half the digits.
            squares_G = ((1 - (terms_GIT @ coefficients_GT[:, :, None])[..., 0]) ** 2).sum(axis=1)
            best = int(squares_G.argmin())
            centre_J = exponents_GJ[best]
            # At its border the grid moves on as it is, so that a slanting valley is followed to its end.
            if np.abs(offsets_GJ[best]).max() < 2:
                ratio /= 2
            if ratio < FINEST_RATIO:
                break
        # The logarithm of a coefficient of zero would be no number to go on with.
        logs_T = np.log(np.maximum(coefficients_GT[best], np.finfo(float).tiny))
        return Fit(np.concatenate([logs_T, centre_J]), float(squares_G[best]))

    def coefficients(self, theta_RP: FloatArray) -> FloatArray:
        """E (if there is one) and the K_j in the units of the points, (R, T)."""
        logs_RT = theta_RP[:, : self.num_terms] + self.log_loss.mean()
        logs_RT[:, int(self.irreducible) :] += self.exponents(theta_RP) * self.log_x.mean(axis=1)
        with np.errstate(over="ignore"):
            coefficients: FloatArray = np.exp(logs_RT)
        return coefficients

    def exponents(self, theta_RP: FloatArray) -> FloatArray:
        """The p_j, (R, J)."""
        return theta_RP[:, self.num_terms :]

    def predict(self, theta_RP: FloatArray, log_x_JI: FloatArray) -> FloatArray:
        """Losses at other points, (R, I)."""
        centred_JI = log_x_JI - self.log_x.mean(axis=1, keepdims=True)
        powers_RJI = -self.exponents(theta_RP)[:, :, None] * centred_JI
        logs_RTI = np.repeat(theta_RP[:, : self.num_terms, None], log_x_JI.shape[1], axis=2)
        logs_RTI[:, int(self.irreducible) :] += powers_RJI
        losses: FloatArray = np.exp(logs_RTI + self.log_loss.mean()).sum(axis=1)
        return losses

    @functools.cached_property
    def _centred_x(self) -> FloatArray:
        centred: FloatArray = self.log_x - self.log_x.mean(axis=1, keepdims=True)
        return centred

    def _relative_terms(self, exponents_GJ: FloatArray) -> FloatArray:
        """The terms of centred logarithms, without coefficients and over the losses, (G, I, T)."""
        powers_GIJ = -exponents_GJ[:, None, :] * self._centred_x.T
        constant_GI1 = np.zeros((*powers_GIJ.shape[:2], int(self.irreducible)))
        terms: FloatArray = np.exp(
            np.concatenate([constant_GI1, powers_GIJ], axis=2) - self.problem.log_loss[:, None]
        )
        return terms

    def _grid_starts(self, weights_RI: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The whole grid as parameters (R, G, P), and the squares left at each point of it."""
        exponents_GJ = _EXPONENT_GRIDS[len(self.log_x)]
        coefficients_RGT, squares_RG = project(self._relative_terms(exponents_GJ), weights_RI)
        logs_RGT = np.log(np.maximum(coefficients_RGT, SMALLEST_START))
        exponents_RGJ = np.broadcast_to(exponents_GJ, (*squares_RG.shape, exponents_GJ.shape[1]))
        return np.concatenate([logs_RGT, exponents_RGJ], axis=2), squares_RG
