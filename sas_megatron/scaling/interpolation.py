"""Losses of a variant at a given amount, interpolated between its cells, as functions of the cells' losses.

Each reading states its derivative by the loss of each cell, so that the error of a difference follows from
the noise of the cells. Losses are never extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sas_megatron.scaling.laws.log_sum import FloatArray
from sas_megatron.scaling.laws.points import SAME_LEVEL
from sas_megatron.scaling.seed_noise import Cell

FEWEST_SIZES = 3


@dataclass(frozen=True)
class LossReading:
    """A loss, its derivative by the loss of each cell, and its slope over the logarithm of the amount."""

    loss: float
    weights: dict[Cell, float]
    slope: float


def interpolate_loss(
    spent: Mapping[Cell, float], losses: Mapping[Cell, float], amount: float
) -> LossReading | None:
    """Return the loss at an amount; None if the amount is outside the cells.

    The interpolant is the parabola through three cells in logarithms, or the line through two. A line alone
    would lie above the convex curve and favour the variant that is not interpolated. A cell within 1 % of the
    amount is read itself.

    Args:
        spent: The amount of each cell.
        losses: The loss of each cell.
        amount: The amount to read at.
    """
    cells = sorted(spent, key=spent.__getitem__)
    x = np.log([spent[cell] for cell in cells])
    target = math.log(amount)
    if not x[0] - SAME_LEVEL <= target <= x[-1] + SAME_LEVEL:
        return None
    order = [int(index) for index in np.argsort(np.abs(x - target), kind="stable")]
    is_measured = abs(x[order[0]] - target) <= SAME_LEVEL
    if is_measured:
        chosen = order[:1]
    else:
        above = int(np.searchsorted(x, target))
        chosen = [above - 1, above]
    # The nearest of the others that spent a different amount.
    for index in order:
        if len(chosen) < 3 and np.abs(x[index] - x[chosen]).min() > SAME_LEVEL:
            chosen.append(index)
    nodes, y = x[chosen], np.log([losses[cells[index]] for index in chosen])
    shares, slopes = _lagrange(nodes, target)
    if is_measured:
        shares = np.eye(len(chosen))[0]
    loss = math.exp(float(shares @ y))
    weights = {
        cells[index]: float(share * loss / losses[cells[index]])
        for index, share in zip(chosen, shares, strict=True)
        if share
    }
    return LossReading(loss, weights, float(loss * (slopes @ y)))


def find_best_size(
    params: Mapping[str, float], readings: Mapping[str, LossReading]
) -> LossReading | Literal["smallest", "largest"] | None:
    """Return the lowest loss over sizes, at the minimum of a parabola over the logarithm of the size.

    The parabola passes through the size with the lowest loss and its neighbours. If that size has no
    neighbour on a side, the result is its position; with fewer than three sizes, it is None.

    Args:
        params: Parameters of each size.
        readings: The loss of each size at the same amount.
    """
    sizes = sorted(readings, key=params.__getitem__)
    if len(sizes) < FEWEST_SIZES:
        return None
    lowest = min(range(len(sizes)), key=lambda index: readings[sizes[index]].loss)
    if lowest == 0:
        return "smallest"
    if lowest == len(sizes) - 1:
        return "largest"
    chosen = sizes[lowest - 1 : lowest + 2]
    x = np.log([params[size] for size in chosen])
    y = np.array([readings[size].loss for size in chosen])
    left, right = np.diff(y) / np.diff(x)
    middles = (x[:-1] + x[1:]) / 2
    curvature = (right - left) / (middles[1] - middles[0])
    minimum = middles[0] - left / curvature if curvature > 0 else x[1]
    shares, _ = _lagrange(x, float(minimum))
    weights: dict[Cell, float] = {}
    for size, share in zip(chosen, shares, strict=True):
        for cell, weight in readings[size].weights.items():
            weights[cell] = weights.get(cell, 0.0) + float(share) * weight
    slope = sum(float(share) * readings[size].slope for size, share in zip(chosen, shares, strict=True))
    return LossReading(float(shares @ y), weights, slope)


def _lagrange(nodes: FloatArray, target: float) -> tuple[FloatArray, FloatArray]:
    """Return the values and the derivatives of the Lagrange polynomials of the nodes at `target`."""
    count = len(nodes)
    values, slopes = np.ones(count), np.zeros(count)
    for index in range(count):
        others = [other for other in range(count) if other != index]
        gaps = nodes[index] - nodes[others]
        values[index] = np.prod((target - nodes[others]) / gaps)
        slopes[index] = sum(
            np.prod([(target - nodes[other]) for other in others if other != left]) for left in others
        ) / np.prod(gaps)
    return values, slopes
