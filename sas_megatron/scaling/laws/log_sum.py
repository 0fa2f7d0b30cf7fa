"""Huber regression of log losses on log-sums of exponentials, vectorized over rows.

log L̂_i = log Σ_t exp(forms[t, i] · θ)      Σ_i w_i Huber_δ(log L̂_i − log L_i) → min

All laws have this form: E + A/N^α + B/D^β has the terms exp(e), exp(a − α log N), exp(b − β log D) (Hoffmann
et al. 2022, arXiv 2203.15556, equation 3). The objective is a sum, not a mean: with δ = 1e-3 a mean is so
small that optimizers stop early (Besiroglu et al. 2024, arXiv 2404.10102).

Shape letters: R rows, each with a starting point and weights; T terms, I points, P parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.intp]

# δ of Hoffmann et al. 2022, section 3.3. Infinity gives least squares.
HUBER_DELTA = 1e-3
MAX_ITERATIONS = 300
# A row has converged if a step would lower its objective by less than this share, or if its residuals are
# negligible.
RELATIVE_TOLERANCE = 1e-13
NEGLIGIBLE_RESIDUAL = 1e-13
# Keeps the majorizer positive definite if a term has vanished; relative to its trace.
RIDGE = 1e-12
SMALLEST_DAMPING, FIRST_DAMPING, LARGEST_DAMPING = 1e-12, 1e-3, 1e8
# Residuals per block of rows, so that a block fits into the processor's cache.
BLOCK_RESIDUALS = 60_000


class Expansion(NamedTuple):
    """Objective, gradient and Hessian at the parameters of each row.

    `majorizer` is the curvature of the quadratic function that touches the objective from above, for
    linearized residuals: the matrix of iteratively reweighted least squares.
    """

    value: FloatArray
    gradient: FloatArray
    hessian: FloatArray
    majorizer: FloatArray


@dataclass(frozen=True)
class LogSumProblem:
    """A law on its points: linear forms (T, I, P), log losses (I), and the δ of the Huber loss."""

    forms: FloatArray
    log_loss: FloatArray
    delta: float = HUBER_DELTA

    def take(self, chosen: IntArray) -> LogSumProblem:
        """Return the problem of the chosen points."""
        return LogSumProblem(self.forms[:, chosen], self.log_loss[chosen], self.delta)

    def residuals(self, theta_RP: FloatArray) -> FloatArray:
        """Return the log of the predicted minus the log of the measured loss, (R, I)."""
        exponents_RTI = self._exponents(theta_RP)
        largest_R1I = exponents_RTI.max(axis=1, keepdims=True)
        sums_RI = np.exp(exponents_RTI - largest_R1I).sum(axis=1)
        residuals: FloatArray = largest_R1I[:, 0] + np.log(sums_RI) - self.log_loss
        return residuals

    def expand(self, theta_RP: FloatArray, weights_RI: FloatArray) -> Expansion:
        """Return the value, gradient and exact Hessian; at |r| = δ the Hessian is that of |r| < δ."""
        num_terms, num_points, num_parameters = self.forms.shape
        rows = len(theta_RP)
        exponents_RTI = self._exponents(theta_RP)
        largest_R1I = exponents_RTI.max(axis=1, keepdims=True)
        shares_RTI = np.exp(exponents_RTI - largest_R1I)
        sums_R1I = shares_RTI.sum(axis=1, keepdims=True)
        shares_RTI /= sums_R1I
        residuals_RI = (largest_R1I + np.log(sums_R1I))[:, 0] - self.log_loss
        clipped_RI = np.clip(residuals_RI, -self.delta, self.delta)
        slopes_RI = weights_RI * clipped_RI
        value_R = (slopes_RI * (residuals_RI - clipped_RI / 2)).sum(axis=1)

        slopes_RX = (shares_RTI * slopes_RI[:, None]).reshape(rows, num_terms * num_points)
        forms_XP = self.forms.reshape(num_terms * num_points, num_parameters)
        squares_XQ = (forms_XP[:, :, None] * forms_XP[:, None, :]).reshape(len(forms_XP), -1)
        jacobian_RIP = np.zeros((rows, num_points, num_parameters))
        for term in range(num_terms):
            jacobian_RIP += shares_RTI[:, term, :, None] * self.forms[term]
        # ∇² log Σ exp = Σ_t share_t m_t m_tᵀ − g gᵀ, times Huber's slope, plus g gᵀ times Huber's curvature.
        curvatures_RI = weights_RI * (np.abs(residuals_RI) <= self.delta) - slopes_RI
        transposed_RPI = jacobian_RIP.transpose(0, 2, 1)
        hessian_RPP = (transposed_RPI * curvatures_RI[:, None]) @ jacobian_RIP
        hessian_RPP += (slopes_RX @ squares_XQ).reshape(rows, num_parameters, num_parameters)
        # Curvature of the majorizing parabola of Huber's loss: 1 for |r| ≤ δ, δ/|r| otherwise.
        parabolas_RI = weights_RI * np.where(
            np.abs(residuals_RI) <= self.delta, 1.0, clipped_RI / np.where(residuals_RI == 0, 1, residuals_RI)
        )
        majorizer_RPP = (transposed_RPI * parabolas_RI[:, None]) @ jacobian_RIP
        return Expansion(value_R, slopes_RX @ forms_XP, hessian_RPP, majorizer_RPP)

    def _exponents(self, theta_RP: FloatArray) -> FloatArray:
        num_terms, num_points, num_parameters = self.forms.shape
        flat: FloatArray = theta_RP @ self.forms.reshape(-1, num_parameters).T
        return flat.reshape(len(theta_RP), num_terms, num_points)


class Minima(NamedTuple):
    """Final parameters and objective of each row."""

    theta: FloatArray
    value: FloatArray


def minimize(
    problem: LogSumProblem,
    starts_RP: FloatArray,
    weights_RI: FloatArray,
    *,
    frozen_RP: BoolArray | None = None,
) -> Minima:
    """Minimize the objective of each row by Newton steps that are damped with the majorizer.

    Args:
        problem: The law and its points.
        starts_RP: Starting points.
        weights_RI: Weights of the points, broadcast over rows.
        frozen_RP: Mask of parameters that keep their starting value.
    """
    rows = len(starts_RP)
    weights_RI = np.broadcast_to(weights_RI, (rows, len(problem.log_loss)))
    frozen_RP = np.zeros(starts_RP.shape, bool) if frozen_RP is None else frozen_RP
    block_rows = max(1, BLOCK_RESIDUALS // len(problem.log_loss))
    blocks = [
        _minimize_block(problem, starts_RP[block], weights_RI[block], frozen_RP[block])
        for block in (slice(first, first + block_rows) for first in range(0, rows, block_rows))
    ]
    return Minima(
        np.concatenate([block.theta for block in blocks]),
        np.concatenate([block.value for block in blocks]),
    )


def _minimize_block(
    problem: LogSumProblem, starts_RP: FloatArray, weights_RI: FloatArray, frozen_RP: BoolArray
) -> Minima:
    theta_RP = starts_RP.copy()
    value_R, gradient_RP, hessian_RPP, majorizer_RPP = problem.expand(theta_RP, weights_RI)
    damping_R = np.full(len(theta_RP), FIRST_DAMPING)
    negligible_R = weights_RI.sum(axis=1) * NEGLIGIBLE_RESIDUAL**2
    active = np.arange(len(theta_RP))
    for _ in range(MAX_ITERATIONS):
        step_AP, predicted_A = _newton_steps(
            Expansion(value_R[active], gradient_RP[active], hessian_RPP[active], majorizer_RPP[active]),
            damping_R[active],
            frozen_RP[active],
        )
        found = problem.expand(theta_RP[active] + step_AP, weights_RI[active])
        # A step that overflows gives NaN and is rejected.
        gain_A = np.nan_to_num(value_R[active] - found.value, nan=-np.inf)
        kept_A = gain_A > 0
        kept = active[kept_A]
        theta_RP[kept] += step_AP[kept_A]
        value_R[kept] = found.value[kept_A]
        gradient_RP[kept] = found.gradient[kept_A]
        hessian_RPP[kept] = found.hessian[kept_A]
        majorizer_RPP[kept] = found.majorizer[kept_A]
        ratio_A = gain_A / np.maximum(predicted_A, np.finfo(float).tiny)
        factor_A = np.where(ratio_A > 0.75, 0.2, np.where(ratio_A > 0.25, 1.0, 4.0))
        damping_R[active] = np.clip(damping_R[active] * factor_A, SMALLEST_DAMPING, LARGEST_DAMPING)
        done_A = predicted_A <= RELATIVE_TOLERANCE * value_R[active]
        done_A |= (value_R[active] <= negligible_R[active]) | (damping_R[active] >= LARGEST_DAMPING)
        active = active[~done_A]
        if len(active) == 0:
            break
    return Minima(theta_RP, value_R)


def _newton_steps(
    at: Expansion, damping_R: FloatArray, frozen_RP: BoolArray
) -> tuple[FloatArray, FloatArray]:
    """Return the damped steps and the decrease of the objective that the quadratic model predicts.

    (H + λ M) step = −g with the majorizer M. H alone may be zero, since few residuals are smaller than δ.
    """
    gradient_RP = np.where(frozen_RP, 0.0, at.gradient)
    either_RPP = frozen_RP[:, :, None] | frozen_RP[:, None, :]
    hessian_RPP, majorizer_RPP = (np.where(either_RPP, 0.0, matrix) for matrix in (at.hessian, at.majorizer))
    trace_R11 = np.maximum(np.trace(majorizer_RPP, axis1=1, axis2=2), np.finfo(float).tiny)[:, None, None]
    # Coordinates in which M is the identity.
    factor_RPP = np.linalg.cholesky(majorizer_RPP + RIDGE * trace_R11 * np.eye(gradient_RP.shape[1]))
    half_RPP = np.linalg.solve(factor_RPP, hessian_RPP)
    whitened_RPP = np.linalg.solve(factor_RPP, half_RPP.transpose(0, 2, 1))
    eigenvalues_RP, vectors_RPP = np.linalg.eigh((whitened_RPP + whitened_RPP.transpose(0, 2, 1)) / 2)
    downhill_RP = np.linalg.solve(factor_RPP, gradient_RP[:, :, None])[:, :, 0]
    along_RP = (vectors_RPP * downhill_RP[:, :, None]).sum(axis=1)
    # The damping exceeds the most negative curvature, so that every step is a descent step, at saddles too.
    shift_R = np.maximum(damping_R, -1.5 * eigenvalues_RP[:, 0])
    steps_RP = -along_RP / (eigenvalues_RP + shift_R[:, None])
    predicted_R = -(along_RP * steps_RP + eigenvalues_RP * steps_RP**2 / 2).sum(axis=1)
    whitened_step_RP = (vectors_RPP * steps_RP[:, None, :]).sum(axis=2)
    step_RP = np.linalg.solve(factor_RPP.transpose(0, 2, 1), whitened_step_RP[:, :, None])[:, :, 0]
    return np.where(frozen_RP, 0.0, step_RP), predicted_R
