"""Variable projection: for given exponents, the coefficients follow from non-negative least squares.

L_i ≈ Σ_t c_t f_t(x_i; exponents), c ≥ 0, so that a grid over the exponents alone covers all parameters (Golub
and Pereyra 1973, SIAM J. Numer. Anal. 10; for scaling laws arXiv 2603.22339). Residuals are relative,
(L̂ − L)/L, which equals log residuals to first order and makes the fit independent of the unit of the loss.

Shape letters: R rows of weights, G grid points, T terms, I points.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from sas_megatron.scaling.laws.log_sum import FloatArray

# Keeps the normal equations solvable if two terms coincide; relative to their trace.
RIDGE = 1e-13


class Projection(NamedTuple):
    """Optimal coefficients and the residual sum of squares, for each row and grid point."""

    coefficients: FloatArray
    squares: FloatArray


def project(terms_GIT: FloatArray, weights_RI: FloatArray) -> Projection:
    """Solve min_c≥0 Σ_i w_i (1 − Σ_t c_t terms[g, i, t])² for each row and grid point.

    Args:
        terms_GIT: Terms of the law divided by the measured losses.
        weights_RI: Weights of the points.
    """
    grid, points, num_terms = terms_GIT.shape
    products_GXI = np.concatenate(
        [
            (terms_GIT[:, :, :, None] * terms_GIT[:, :, None, :]).reshape(grid, points, -1),
            terms_GIT,
        ],
        axis=2,
    ).transpose(0, 2, 1)
    sums_RGX = (weights_RI @ products_GXI.reshape(-1, points).T).reshape(len(weights_RI), grid, -1)
    gram = sums_RGX[..., : num_terms**2].reshape(len(weights_RI), grid, num_terms, num_terms)
    target = sums_RGX[..., num_terms**2 :]
    coefficients = solve_non_negative(gram, target)
    explained = 2 * (target * coefficients).sum(-1)
    explained -= np.einsum("rgt,rgtu,rgu->rg", coefficients, gram, coefficients)
    return Projection(coefficients, weights_RI.sum(axis=1)[:, None] - explained)


def solve_non_negative(gram: FloatArray, target: FloatArray) -> FloatArray:
    """Return argmin_c≥0 cᵀ·gram·c − 2 target·c for few terms, by trying every set of positive terms."""
    num_terms = target.shape[-1]
    best = np.zeros_like(target)
    lowest = np.zeros(target.shape[:-1])
    trace = np.trace(gram, axis1=-2, axis2=-1)
    # A row with zero weights, a draw without any run of a variant, has no trace to refer to.
    ridge = np.where(trace > 0, RIDGE * trace, 1.0)[..., None, None] * np.eye(num_terms)
    for size in range(1, num_terms + 1):
        for chosen in itertools.combinations(range(num_terms), size):
            rows, columns = np.ix_(chosen, chosen)
            solved = np.linalg.solve(
                (gram + ridge)[..., rows, columns], target[..., list(chosen)][..., None]
            )[..., 0]
            value = -(solved * target[..., list(chosen)]).sum(-1)
            better = (solved >= 0).all(-1) & (value < lowest)
            lowest = np.where(better, value, lowest)
            candidate = np.zeros_like(target)
            candidate[..., list(chosen)] = solved
            best = np.where(better[..., None], candidate, best)
    return best
