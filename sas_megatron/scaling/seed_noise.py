"""Noise between seeds: the error of any weighted difference of two variants, and its degrees of freedom.

A cell is one size and one budget. Cells are fixed effects: an interval holds for the sizes and budgets that
were trained. Only seeds are random. A seed determines the order of the data at all sizes and budgets, and the
budgets of a trunk share most of their steps, so that the runs of a seed are not independent repetitions: a
seed counts once. The noise of a weighted mean over cells is therefore measured on the mean itself. The same
weights are applied to every variant that has two or more seeds in these cells, one value z per seed, with

    z = effect of the variant + effect of the seed (the same for all variants) + interaction.

The two variances are pooled over variants (Henderson's method 3, 1953, Biometrics 9). The degrees of freedom
follow Satterthwaite (1946, Biometrics Bulletin 2). With equal seeds for both variants the effect of the seed
cancels and the test is exact: for two variants it is the paired t-test, for more the t-test of a two-way
analysis of variance. A variant with one seed is compared with the mean over the baseline's seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from sas_megatron.scaling.analysis_of_variance import SumsOfSquares, analyze_variance, complete_table
from sas_megatron.scaling.laws.log_sum import FloatArray
from sas_megatron.scaling.significance import Estimate, Part, add_variances

# Deviations from the other seeds of a cell beyond which a run is an outlier.
OUTLIER = 3.0
# Standard deviation of the prior on the power of the budget to which the variance is proportional. Few seeds
# would otherwise give nearly all weight to the budget whose runs happen to lie together.
SLOPE_PRIOR = 1.0

Cell = tuple[str, str]
Weights = Mapping[Cell, float]


@dataclass(frozen=True)
class SeedLosses:
    """The losses of one variant by cell (rows) and seed (columns), with missing runs completed.

    A missing run is assumed to differ from the other seeds of its cell as its seed does in others. `seeds`
    are the columns of `losses`: those that share a cell with another seed. If there are none, a single column
    has the mean of each cell. `measured` has all seeds as columns, and NaN for a missing run.
    """

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    losses: FloatArray
    all_seeds: tuple[int, ...]
    measured: FloatArray

    @staticmethod
    def of(losses: Mapping[Cell, Mapping[int, float]]) -> SeedLosses:
        """Build the table from the losses by cell and seed."""
        cells = tuple(losses)
        seeds = np.array(sorted({seed for by_seed in losses.values() for seed in by_seed}))
        measured_CS = np.array([[losses[cell].get(seed, math.nan) for seed in seeds] for cell in cells])
        known_CS = np.isfinite(measured_CS)
        # A seed that is alone in all of its cells does not show how seeds differ.
        repeated_S = known_CS[known_CS.sum(axis=1) > 1].any(axis=0)
        if repeated_S.any():
            completed_CS = complete_table(measured_CS)[:, repeated_S]
            used = tuple(seeds[repeated_S].tolist())
            return SeedLosses(cells, used, completed_CS, tuple(seeds.tolist()), measured_CS)
        most = int(known_CS.sum(axis=0).argmax())
        means_C1 = np.nanmean(measured_CS, axis=1, keepdims=True)
        return SeedLosses(cells, (int(seeds[most]),), means_C1, tuple(seeds.tolist()), measured_CS)

    @property
    def means(self) -> dict[Cell, float]:
        """The mean over seeds of each cell."""
        return dict(zip(self.cells, self.losses.mean(axis=1).tolist(), strict=True))

    def combine(self, weights: Weights) -> FloatArray | None:
        """Return the weighted sum over cells by seed; None if a cell is missing."""
        if not weights.keys() <= set(self.cells):
            return None
        vector_C = np.array([weights.get(cell, 0.0) for cell in self.cells])
        combined: FloatArray = vector_C @ self.losses
        return combined


@dataclass(frozen=True)
class Outlier:
    """A run that is more than `OUTLIER` pooled deviations from the other seeds of its cell."""

    variant: str
    cell: Cell
    seed: int
    deviations: float


@dataclass(frozen=True)
class NoiseModel:
    """The losses of all variants, and the deviation of a run by budget, pooled over variants and sizes."""

    tables: Mapping[str, SeedLosses]
    deviations: Mapping[str, float]
    degrees: int

    @staticmethod
    def of(losses: Mapping[str, Mapping[Cell, Mapping[int, float]]]) -> NoiseModel:
        """Build the model from the losses by variant, cell and seed."""
        tables = {variant: SeedLosses.of(by_cell) for variant, by_cell in losses.items()}
        pooled = {budget: (0.0, 0) for table in tables.values() for _, budget in table.cells}
        for table in tables.values():
            for (_, budget), measured_S in zip(table.cells, table.measured, strict=True):
                known_S = measured_S[np.isfinite(measured_S)]
                squares, degrees = pooled[budget]
                pooled[budget] = (squares + float(known_S.var()) * len(known_S), degrees + len(known_S) - 1)
        return NoiseModel(tables, _smooth(pooled), sum(degrees for _, degrees in pooled.values()))

    def find_outliers(self) -> tuple[Outlier, ...]:
        """Return the runs that are far from the mean of the other seeds of their cell."""
        found: list[Outlier] = []
        for variant, table in self.tables.items():
            for cell, measured_S in zip(table.cells, table.measured, strict=True):
                count = int(np.isfinite(measured_S).sum())
                deviation = self.deviations[cell[1]]
                if count < 2 or deviation == 0:
                    continue
                # The distance to the mean of the others has the variance σ² n / (n − 1).
                distances = (measured_S - np.nanmean(measured_S)) * math.sqrt(count / (count - 1)) / deviation
                # An outlier also moves the mean of the others: only the farthest run of a cell is one.
                farthest = int(np.nanargmax(np.abs(distances)))
                if abs(distances[farthest]) > OUTLIER:
                    seed = table.all_seeds[farthest]
                    found.append(Outlier(variant, cell, seed, float(distances[farthest])))
        return tuple(found)

    def weigh(self, parts: Sequence[tuple[Weights, Weights]]) -> FloatArray:
        """Return weights of differences that add to 1, proportional to 1 / variance.

        The variance is that of the difference of single runs, by their budgets alone.

        Args:
            parts: For each difference, the weights of the candidate's and of the baseline's cells.
        """
        variances = np.array(
            [
                sum(
                    weight**2 * self.deviations.get(budget, 1.0) ** 2
                    for weights in part
                    for (_, budget), weight in weights.items()
                )
                for part in parts
            ]
        )
        inverse = 1 / variances if (variances > 0).all() else np.ones(len(parts))
        return np.asarray(inverse / inverse.sum())

    @property
    def num_repeated(self) -> int:
        """The number of variants with two or more seeds."""
        return sum(len(table.seeds) > 1 for table in self.tables.values())

    def estimate(
        self,
        difference: float,
        *,
        candidate: str,
        baseline: str,
        weights: tuple[Weights, Weights],
        others: Sequence[Part] = (),
    ) -> Estimate:
        """Return the error of a weighted difference between two variants.

        Args:
            difference: The candidate's weighted loss minus the baseline's.
            candidate: Name of a variant.
            baseline: Name of the other variant.
            weights: Weights of the candidate's cells and of the baseline's cells.
            others: Further independent parts of the variance.
        """
        ours, theirs = self.tables[candidate].seeds, self.tables[baseline].seeds
        sums = self._pool(weights, (1 / len(ours), 1 / len(theirs)))
        degrees = sums.seeds_degrees + sums.interaction_degrees
        if not degrees:
            return Estimate(difference)
        single = 1 / len(ours) + 1 / len(theirs)
        # The effects of the seeds that only one of the two has do not cancel.
        unshared = sum(
            ((seed in ours) / len(ours) - (seed in theirs) / len(theirs)) ** 2 for seed in {*ours, *theirs}
        )
        mean_square = (sums.seeds + sums.interaction) / degrees
        parts = [*others]
        if sums.interaction_degrees:
            interaction = sums.interaction / sums.interaction_degrees
            constant = (single - unshared) * interaction + unshared * sums.interaction / degrees
            parts.append((constant, sums.interaction_degrees))
            if sums.seeds_degrees:
                parts.append((unshared * sums.seeds / degrees, sums.seeds_degrees))
        else:
            # The effects of seeds cannot be separated: they are assumed not to cancel.
            interaction = mean_square
            parts.append((single * mean_square, degrees))
        variance, effective = add_variances(parts)
        return Estimate.of(difference, math.sqrt(variance), effective, math.sqrt(2 * interaction))

    def _pool(self, weights: tuple[Weights, Weights], shares: tuple[float, float]) -> SumsOfSquares:
        """Return the sums of squares of all variants, averaged over the two sets of weights."""
        found = []
        for one in weights:
            rows = [
                dict(zip(table.seeds, combined.tolist(), strict=True))
                for table in self.tables.values()
                if len(table.seeds) > 1 and (combined := table.combine(one)) is not None
            ]
            found.append(analyze_variance(rows))
        fewest = min(found, key=lambda sums: (sums.interaction_degrees, sums.seeds_degrees))
        if not all(sums.seeds_degrees + sums.interaction_degrees for sums in found):
            return SumsOfSquares(0.0, 0, 0.0, 0)
        shared = np.array(shares) / sum(shares)

        def average(name: str) -> float:
            degrees = getattr(fewest, f"{name}_degrees")
            # Both are linear combinations of the same runs, so that they count once.
            means = [
                getattr(sums, name) / count if (count := getattr(sums, f"{name}_degrees")) else 0.0
                for sums in found
            ]
            return float(shared @ means) * int(degrees)

        return SumsOfSquares(
            average("seeds"), fewest.seeds_degrees, average("interaction"), fewest.interaction_degrees
        )


def _smooth(pooled: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Return the deviation of a run by budget, with a variance proportional to a power of the budget.

    The power is fitted to the logarithms of the variances, with their exact means and variances for normal
    losses, and a normal prior with mean 0.

    Args:
        pooled: For each budget, the sum of squares of runs within cells and its degrees of freedom.
    """
    budgets = {budget: math.log(float(budget)) for budget in pooled}
    known = {budget: part for budget, part in pooled.items() if part[0] > 0}
    slope = 0.0
    if known:
        x = np.array([budgets[budget] for budget in known])
        squares, degrees = np.array(list(known.values())).T
        y = np.log(squares / 2) - special.digamma(degrees / 2)
        weights = 1 / special.polygamma(1, degrees / 2)
        x_centred = x - weights @ x / weights.sum()
        slope = float(weights @ (x_centred * y) / (weights @ x_centred**2 + SLOPE_PRIOR**-2))
    scales = {budget: math.exp(slope * position) for budget, position in budgets.items()}
    degrees_of_freedom = sum(count for _, count in pooled.values())
    total = sum(square / scales[budget] for budget, (square, _) in pooled.items())
    base = total / degrees_of_freedom if degrees_of_freedom else 0.0
    return {budget: math.sqrt(base * scale) for budget, scale in scales.items()}
