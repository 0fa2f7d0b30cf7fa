"""Differences of two variants at equal parameters, tokens, FLOPs or time, cell by cell.

A cell of the candidate is compared with the baseline's loss at the same position on the axis: with a cell
that spent the same amount (within 1 %) if there is one, otherwise with a curve through cells that spent more
and less, each trained to the end of its own schedule. For FLOPs, tokens and time the curve joins the budgets
of one size; for parameters it joins the sizes trained on equal tokens.

`match_best_sizes` compares frontiers instead: at the amount of each cell, the lowest loss of the candidate
over all sizes with the lowest loss of the baseline.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sas_megatron.scaling.interpolation import LossReading, find_best_size, interpolate_loss
from sas_megatron.scaling.laws.points import SAME_LEVEL
from sas_megatron.scaling.outcomes import AXES, Axis, Outcome, Spending
from sas_megatron.scaling.seed_noise import Cell, NoiseModel


@dataclass(frozen=True)
class CellDifference:
    """The candidate's loss minus the baseline's at one amount.

    `size` and `budget` are those of the candidate's cell; the size is None if best sizes are compared.
    `weights` are the derivatives of the difference by the losses of the candidate's and of the baseline's
    cells, the latter with the opposite sign. `slope` is that of the baseline's loss over the logarithm of the
    amount.
    """

    size: str | None
    budget: str
    amount: float
    difference: float
    weights: tuple[dict[Cell, float], dict[Cell, float]]
    slope: float


@dataclass(frozen=True)
class VariantCells:
    """The mean loss over seeds of each cell of a variant, and the amounts that its runs spent."""

    losses: Mapping[Cell, float]
    amounts: Mapping[Axis, Mapping[Cell, float]]
    seconds_error: float | None

    @staticmethod
    def of(runs: Sequence[Outcome], noise: NoiseModel) -> VariantCells:
        """Average the runs of one variant."""
        groups: dict[Cell, list[Outcome]] = {}
        for run in runs:
            groups.setdefault(run.cell, []).append(run)
        errors = [run.seconds_error for run in runs]
        return VariantCells(
            noise.tables[runs[0].variant].means,
            {axis: _average_known(groups, axis) for axis in AXES},
            None if None in errors else float(np.mean([error for error in errors if error is not None])),
        )

    def read_size(self, axis: Axis, size: str, amount: float) -> LossReading | None:
        """Return the loss of a size at an amount."""
        spent = {cell: value for cell, value in self.amounts[axis].items() if cell[0] == size}
        return interpolate_loss(spent, self.losses, amount) if spent else None

    def read_tokens(self, tokens: float, params: float) -> LossReading | None:
        """Return the loss at a number of parameters, from the sizes trained on equal tokens."""
        spent = {
            cell: self.amounts["params"][cell]
            for cell, value in self.amounts["tokens"].items()
            if abs(math.log(value / tokens)) <= SAME_LEVEL
        }
        return interpolate_loss(spent, self.losses, params) if spent else None

    def read_best_size(self, axis: Axis, amount: float) -> LossReading | str | None:
        """Return the lowest loss over sizes at an amount, as `find_best_size`."""
        params = {size: value for (size, _), value in self.amounts["params"].items()}
        readings = {size: self.read_size(axis, size, amount) for size in params}
        return find_best_size(
            params, {size: reading for size, reading in readings.items() if reading is not None}
        )


def match_sizes(
    candidate: VariantCells, baseline: VariantCells, axis: Axis
) -> tuple[list[CellDifference], list[Cell]]:
    """Compare each cell of the candidate with the baseline, of the same size for all axes but parameters.

    Returns:
        The differences, and the cells of the candidate that the baseline's cells do not enclose.
    """
    found, unmatched = [], []
    for cell, loss in candidate.losses.items():
        amount = candidate.amounts[axis].get(cell)
        reading = None
        if amount is not None:
            if axis == "params":
                reading = baseline.read_tokens(candidate.amounts["tokens"][cell], amount)
            else:
                reading = baseline.read_size(axis, cell[0], amount)
        if amount is None or reading is None:
            unmatched.append(cell)
            continue
        weights = ({cell: 1.0}, reading.weights)
        found.append(CellDifference(*cell, amount, loss - reading.loss, weights, reading.slope))
    return found, unmatched


def match_best_sizes(
    candidate: VariantCells, baseline: VariantCells, axis: Spending
) -> tuple[list[CellDifference], Counter[str]]:
    """Compare the lowest losses over sizes at the amount of each cell of the candidate.

    Returns:
        The differences where the sizes of both variants enclose their best size, and how often the baseline's
        best size is its "smallest" or "largest" at the amounts at which three sizes can be read.
    """
    found: list[CellDifference] = []
    at_edge: Counter[str] = Counter()
    for cell, amount in sorted(candidate.amounts[axis].items(), key=lambda item: item[1]):
        if found and math.log(amount / found[-1].amount) <= SAME_LEVEL:
            continue
        ours, theirs = candidate.read_best_size(axis, amount), baseline.read_best_size(axis, amount)
        if isinstance(theirs, str):
            at_edge[theirs] += 1
        if isinstance(ours, LossReading) and isinstance(theirs, LossReading):
            weights = (ours.weights, theirs.weights)
            found.append(
                CellDifference(None, cell[1], amount, ours.loss - theirs.loss, weights, theirs.slope)
            )
    return found, at_edge


def _average_known(groups: Mapping[Cell, Sequence[Outcome]], axis: Axis) -> dict[Cell, float]:
    """Return the mean amount of each cell in which it is known for every run."""
    return {
        cell: float(np.mean([run.known(axis) for run in runs]))
        for cell, runs in groups.items()
        if all(getattr(run, axis) is not None for run in runs)
    }
