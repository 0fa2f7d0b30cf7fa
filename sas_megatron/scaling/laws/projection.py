"""Variable projection: given the exponents, a law's coefficients are a small non-negative least squares.

L_i ≈ Σ_t c_t f_t(x_i; exponents), c ≥ 0, so a grid over the exponents alone searches the whole law (Golub and
Pereyra 1973, SIAM J. Numer. Anal. 10; for scaling laws arXiv 2603.22339). Residuals are relative, (L̂ − L)/L,
which to first order are those of the logarithms; they make the fit the same in any unit of loss.

Letters of shapes: R rows of weights, G grid points, T terms, I points.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from sas_megatron.scaling.laws.log_sum import FloatArray

# Keeps normal equations solvable where two terms coincide; relative to their trace.
RIDGE = 1e-13


class Projection(NamedTuple):
    """For each row and grid point the best coefficients and the sum of squares they leave."""

    coefficients: FloatArray
    squares: FloatArray


def project(terms_GIT: FloatArray, weights_RI: FloatArray) -> Projection:
    """Solves min_c≥0 Σ_i w_i (1 − Σ_t c_t terms[g, i, t])² for each row and grid point.

    `terms_GIT` are the law's terms divided by the measured losses.
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
    """argmin_c≥0 cᵀ·gram·c − 2 target·c, for stacks of a few terms: by trying every set of positive ones."""
    num_terms = target.shape[-1]
    best = np.zeros_like(target)
    lowest = np.zeros(target.shape[:-1])
    trace = np.trace(gram, axis1=-2, axis2=-1)
    # A row whose weights are all zero, a draw without any run of a variant, has nothing to be relative to.
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
