"""Fit of L = E + Σ_j K_j / x_j^p_j: starting points by variable projection, minima by Newton's method.

regressors, losses -> centred logarithms -> grid of exponents with projected coefficients
  -> Newton's method from the best grid points and some distant ones -> lowest minimum

Logarithms are centred, so that the units of loss, parameters, tokens and FLOPs do not affect the exponents.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sas_megatron.scaling.laws.log_sum import HUBER_DELTA, FloatArray, IntArray, LogSumProblem, minimize
from sas_megatron.scaling.laws.projection import project

# Exponents of published laws lie between 0.05 and 0.8 (Kaplan et al. 2020, Hoffmann et al. 2022).
GRID_EXPONENTS = np.geomspace(0.02, 3.0, 20)
NUM_STARTS = 32
# With more points than this, minima are found on as many of them, and the lowest ones are completed on all
# points. The law is then so well determined that the minimum for other weights is near.
MOST_START_POINTS, NUM_FINALISTS = 2000, 3
# All combinations of exponents, by number of regressors.
_EXPONENT_GRIDS = {count: np.array(list(itertools.product(GRID_EXPONENTS, repeat=count))) for count in (1, 2)}
# A term that never exceeds this share of the loss counts as absent.
NEGLIGIBLE_SHARE = 1e-6
# Final step of `fit_projected`, as the logarithm of a ratio of exponents, and its maximum number of grids.
FINEST_RATIO, MAX_REFINEMENTS = 1e-9, 400
# A term that the projection sets to zero starts at this share of the mean loss, so that it can grow.
SMALLEST_START = 1e-2


class Fit(NamedTuple):
    """Parameters (log coefficients, then exponents, for centred logarithms) and their objective."""

    theta: FloatArray
    objective: float


@dataclass(frozen=True)
class SumOfPowers:
    """The law on its points: logarithms of J regressors, `log_x` (J, I), and of the losses (I)."""

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
        """Build the problem from measured positive values."""
        return SumOfPowers(
            np.log(np.stack([np.asarray(values, float) for values in regressors])),
            np.log(np.asarray(loss, float)),
            irreducible,
            delta,
        )

    @property
    def num_terms(self) -> int:
        """Number of regressors, plus one for the irreducible loss."""
        return len(self.log_x) + self.irreducible

    @property
    def num_parameters(self) -> int:
        """Number of coefficients (one per term) and exponents (one per regressor)."""
        return self.num_terms + len(self.log_x)

    @functools.cached_property
    def problem(self) -> LogSumProblem:
        """The terms as linear forms of the parameters."""
        num_points = len(self.log_loss)
        forms_TIP = np.zeros((self.num_terms, num_points, self.num_parameters))
        for term in range(self.num_terms):
            forms_TIP[term, :, term] = 1
        for number, centred_I in enumerate(self._centred_x):
            forms_TIP[number + self.irreducible, :, self.num_terms + number] = -centred_I
        return LogSumProblem(forms_TIP, self.log_loss - self.log_loss.mean(), self.delta)

    def fit(self) -> Fit:
        """Return the lowest minimum over a grid of starting points."""
        chosen = self._start_points
        problem = self.problem.take(chosen)
        ones_1I = np.ones((1, len(chosen)))
        starts_1GP, squares_1G = self._grid_starts(ones_1I, chosen)
        # Starts are selected by rank, densely among the best grid points and sparsely among the others.
        ranks = np.unique(np.geomspace(1, starts_1GP.shape[1], NUM_STARTS).round().astype(int)) - 1
        starts_RP = starts_1GP[0, np.argsort(squares_1G[0])[ranks]]
        minima = minimize(problem, starts_RP, ones_1I)
        if self._is_large:
            finalists_RP = minima.theta[np.argsort(minima.value)[:NUM_FINALISTS]]
            minima = minimize(self.problem, finalists_RP, np.ones((1, len(self.log_loss))))
        lowest = int(minima.value.argmin())
        return Fit(minima.theta[lowest], float(minima.value[lowest]))

    def refit(self, weights_RI: FloatArray, fit: Fit) -> FloatArray:
        """Return the parameters (R, P) for other weights, started from `fit` and the best grid point."""
        rows = np.arange(len(weights_RI))
        from_fit_RP = np.tile(fit.theta, (len(rows), 1))
        if self._is_large:
            return minimize(self.problem, from_fit_RP, weights_RI).theta
        starts_RGP, squares_RG = self._grid_starts(weights_RI, self._start_points)
        starts = np.concatenate([from_fit_RP, starts_RGP[rows, squares_RG.argmin(axis=1)]])
        minima = minimize(self.problem, starts, np.concatenate([weights_RI, weights_RI]))
        first, second = minima.value.reshape(2, -1)
        halves = minima.theta.reshape(2, len(rows), -1)
        theta_RP: FloatArray = np.where((first <= second)[:, None], halves[0], halves[1])
        return theta_RP

    def fit_projected(self) -> Fit:
        """Fit by variable projection alone: least squares of relative residuals, Σ (1 − L̂/L)².

        The grid is refined around its best exponents until its steps are as small as rounding errors.
        """
        ones_1I = np.ones((1, len(self.log_loss)))
        _, squares_1G = self._grid_starts(np.ones((1, len(self._start_points))), self._start_points)
        centre_J = _EXPONENT_GRIDS[len(self.log_x)][squares_1G[0].argmin()]
        offsets_GJ = np.array(list(itertools.product(range(-2, 3), repeat=len(centre_J))))
        ratio = float(np.log(GRID_EXPONENTS[1] / GRID_EXPONENTS[0]))
        for _ in range(MAX_REFINEMENTS):
            exponents_GJ = centre_J * np.exp(offsets_GJ * ratio)
            terms_GIT = self._relative_terms(exponents_GJ, slice(None))
            coefficients_GT = project(terms_GIT, ones_1I).coefficients[0]
            # Computed from the residuals: a difference of sums would lose half of the digits.
            squares_G = ((1 - (terms_GIT @ coefficients_GT[:, :, None])[..., 0]) ** 2).sum(axis=1)
            best = int(squares_G.argmin())
            centre_J = exponents_GJ[best]
            # If the best point is on the border, the grid moves without refinement, along a valley.
            if np.abs(offsets_GJ[best]).max() < 2:
                ratio /= 2
            if ratio < FINEST_RATIO:
                break
        # Avoid the logarithm of zero.
        logs_T = np.log(np.maximum(coefficients_GT[best], np.finfo(float).tiny))
        return Fit(np.concatenate([logs_T, centre_J]), float(squares_G[best]))

    def coefficients(self, theta_RP: FloatArray) -> FloatArray:
        """Return E (if the law has one) and the K_j in the units of the points, (R, T)."""
        logs_RT = theta_RP[:, : self.num_terms] + self.log_loss.mean()
        logs_RT[:, int(self.irreducible) :] += self.exponents(theta_RP) * self.log_x.mean(axis=1)
        with np.errstate(over="ignore"):
            coefficients: FloatArray = np.exp(logs_RT)
        return coefficients

    def exponents(self, theta_RP: FloatArray) -> FloatArray:
        """Return the p_j, (R, J)."""
        return theta_RP[:, self.num_terms :]

    def predict(self, theta_RP: FloatArray, log_x_JI: FloatArray) -> FloatArray:
        """Return the losses at other points, (R, I)."""
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

    @property
    def _is_large(self) -> bool:
        return len(self.log_loss) > MOST_START_POINTS

    @functools.cached_property
    def _start_points(self) -> IntArray:
        """The points on which starting points are found: all, or a random part of many."""
        count = len(self.log_loss)
        if not self._is_large:
            return np.arange(count)
        return np.sort(np.random.default_rng(1).choice(count, MOST_START_POINTS, replace=False))

    def _relative_terms(self, exponents_GJ: FloatArray, chosen: IntArray | slice) -> FloatArray:
        """Return the terms without coefficients, divided by the losses, at the chosen points, (G, I, T)."""
        powers_GIJ = -exponents_GJ[:, None, :] * self._centred_x[:, chosen].T
        constant_GI1 = np.zeros((*powers_GIJ.shape[:2], int(self.irreducible)))
        terms: FloatArray = np.exp(
            np.concatenate([constant_GI1, powers_GIJ], axis=2) - self.problem.log_loss[chosen, None]
        )
        return terms

    def _grid_starts(self, weights_RI: FloatArray, chosen: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return the grid as parameters (R, G, P), and the residual sum of squares of each point (R, G)."""
        exponents_GJ = _EXPONENT_GRIDS[len(self.log_x)]
        coefficients_RGT, squares_RG = project(self._relative_terms(exponents_GJ, chosen), weights_RI)
        logs_RGT = np.log(np.maximum(coefficients_RGT, SMALLEST_START))
        exponents_RGJ = np.broadcast_to(exponents_GJ, (*squares_RG.shape, exponents_GJ.shape[1]))
        return np.concatenate([logs_RGT, exponents_RGJ], axis=2), squares_RG
