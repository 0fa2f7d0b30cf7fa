"""Losses read between cells, their derivatives, and the best of several sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sas_megatron.scaling.interpolation import LossReading, find_best_size, interpolate_loss
from sas_megatron.scaling.seed_noise import Cell

SPENT: dict[Cell, float] = {("s", "1"): 1.0, ("s", "2"): 10.0, ("s", "3"): 100.0}
LOSSES: dict[Cell, float] = {("s", "1"): 4.0, ("s", "2"): 3.0, ("s", "3"): 2.5}


def read(amount: float, losses: dict[Cell, float] = LOSSES) -> LossReading:
    found = interpolate_loss(SPENT, losses, amount)
    assert found is not None
    return found


def test_interpolation_stays_within_the_cells() -> None:
    assert read(9.95).loss == pytest.approx(3.0)
    assert interpolate_loss(SPENT, LOSSES, 101.5) is None
    assert interpolate_loss(SPENT, LOSSES, 0.9) is None
    single = interpolate_loss({("s", "1"): 1.0}, LOSSES, 1.005)
    assert single == LossReading(4.0, {("s", "1"): 1.0}, 0.0)
    # Exact if the logarithm of the loss is a parabola of the logarithm of the amount.
    curve = {cell: float(np.exp(1 + 0.3 * (np.log(x) - 5) ** 2 / 20)) for cell, x in SPENT.items()}
    assert read(30.0, curve).loss == pytest.approx(np.exp(1 + 0.3 * (np.log(30) - 5) ** 2 / 20))


def test_cell_of_the_same_amount_changes_nothing() -> None:
    again = interpolate_loss({**SPENT, ("s", "2b"): 10.0}, {**LOSSES, ("s", "2b"): 3.0}, 30.0)
    assert again is not None
    assert again.loss == pytest.approx(read(30.0).loss)


@pytest.mark.parametrize("amount", [3.0, 30.0])
def test_derivatives_equal_finite_differences(amount: float) -> None:
    found, step = read(amount), 1e-6
    for cell, weight in found.weights.items():
        changed = read(amount, {**LOSSES, cell: LOSSES[cell] + step})
        assert weight == pytest.approx((changed.loss - found.loss) / step, rel=1e-4)
    later = read(amount * (1 + step))
    assert found.slope == pytest.approx((later.loss - found.loss) / math.log1p(step), rel=1e-4)


def test_slope_at_a_cell_is_that_of_the_curve_through_it() -> None:
    assert read(10.0).weights == pytest.approx({("s", "2"): 1.0})
    assert read(10.0).slope == pytest.approx(read(10.2).slope, rel=0.05)


def best_size(minimum: float, losses: dict[str, float] | None = None) -> LossReading | str | None:
    params = {"a": 1e6, "b": 2e6, "c": 4e6, "d": 9e6}
    x = {size: math.log(value / minimum) for size, value in params.items()}
    given = losses or {size: 3.0 + 0.1 * value**2 for size, value in x.items()}
    return find_best_size(
        params, {size: LossReading(loss, {(size, "2"): 1.0}, -0.1) for size, loss in given.items()}
    )


def test_best_size_is_the_minimum_of_a_parabola_between_sizes() -> None:
    found = best_size(3e6)
    assert isinstance(found, LossReading)
    assert found.loss == pytest.approx(3.0)
    assert found.slope == pytest.approx(-0.1)
    assert sum(found.weights.values()) == pytest.approx(1.0)


def test_derivatives_at_the_best_size_equal_finite_differences() -> None:
    losses = {"a": 3.4, "b": 3.1, "c": 3.15, "d": 3.6}
    found = best_size(1.0, losses)
    assert isinstance(found, LossReading)
    for (size, budget), weight in found.weights.items():
        changed = best_size(1.0, {**losses, size: losses[size] + 1e-6})
        assert isinstance(changed, LossReading)
        assert budget == "2"
        assert weight == pytest.approx((changed.loss - found.loss) / 1e-6, abs=1e-4)


def test_best_size_at_the_edge_of_the_sizes_is_not_a_minimum() -> None:
    assert best_size(0.5e6) == "smallest"
    assert best_size(20e6) == "largest"
    assert find_best_size({"a": 1.0, "b": 2.0}, {size: LossReading(3.0, {}, 0.0) for size in "ab"}) is None
