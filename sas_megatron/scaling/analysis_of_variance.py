"""Additive models of rows and columns with missing values: sums of squares, and completed tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sas_megatron.scaling.laws.log_sum import FloatArray


@dataclass(frozen=True)
class SumsOfSquares:
    """Sums of squares of the seeds and of the interaction, with their degrees of freedom."""

    seeds: float
    seeds_degrees: int
    interaction: float
    interaction_degrees: int


def analyze_variance(rows: Sequence[Mapping[int, float]]) -> SumsOfSquares:
    """Return the sums of squares of an additive model of rows (variants) and columns (seeds).

    The first is that of the seeds after the variants, the second that of the residuals; seeds may be missing.

    Args:
        rows: For each variant, a value by seed.
    """
    if not rows:
        return SumsOfSquares(0.0, 0, 0.0, 0)
    seeds = sorted({seed for row in rows for seed in row})
    runs = [
        (number, seeds.index(seed), value) for number, row in enumerate(rows) for seed, value in row.items()
    ]
    within = sum(float(np.var(list(row.values()))) * len(row) for row in rows)
    residual, rank = _fit_additive(runs, len(rows), len(seeds))[1:]
    interaction = min(residual, within)
    return SumsOfSquares(within - interaction, rank - len(rows), interaction, len(runs) - rank)


def complete_table(measured_CS: FloatArray) -> FloatArray:
    """Replace missing runs by the sum of the effects of their cell and seed, fitted to the other runs."""
    known_CS = np.isfinite(measured_CS)
    if known_CS.all():
        return measured_CS
    means_C1 = np.nanmean(measured_CS, axis=1, keepdims=True)
    runs = [
        (int(cell), int(seed), float(measured_CS[cell, seed] - means_C1[cell, 0]))
        for cell, seed in zip(*np.nonzero(known_CS), strict=True)
    ]
    effects = _fit_additive(runs, *measured_CS.shape)[0]
    fitted_CS = effects[: len(measured_CS), None] + effects[None, len(measured_CS) :]
    return np.where(known_CS, measured_CS, means_C1 + fitted_CS)


def _fit_additive(
    runs: Sequence[tuple[int, int, float]], num_rows: int, num_columns: int
) -> tuple[FloatArray, float, int]:
    """Fit row and column effects to (row, column, value); return them, the residual squares and the rank."""
    design = np.zeros((len(runs), num_rows + num_columns))
    for number, (row, column, _) in enumerate(runs):
        design[number, [row, num_rows + column]] = 1
    values = np.array([value for *_, value in runs])
    effects, _, rank, _ = np.linalg.lstsq(design, values)
    return effects, float(((values - design @ effects) ** 2).sum()), int(rank)
