"""Power laws of one variable, with and without an irreducible loss."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy import optimize

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.power_law import PowerLaw, find_frontier, fit_power_law

SPENT = np.geomspace(1e15, 3e19, 7)


@pytest.mark.parametrize(
    ("law", "irreducible"), [(PowerLaw(1.7, 90.0, 0.13), True), (PowerLaw(0.0, 40.0, 0.06), False)]
)
def test_law_without_noise_is_recovered_and_inverted(law: PowerLaw, irreducible: bool) -> None:
    found = fit_power_law(SPENT, law.predict(SPENT), irreducible=irreducible).law
    assert (found.E, found.K, found.gamma) == pytest.approx((law.E, law.K, law.gamma), rel=1e-6)
    np.testing.assert_allclose(found.spend_for(law.predict(SPENT)), SPENT, rtol=1e-5)


def test_least_squares_agree_with_scipy() -> None:
    noise = np.exp(0.01 * np.random.default_rng(4).standard_normal(7))
    loss = PowerLaw(1.7, 90.0, 0.13).predict(SPENT) * noise
    found = fit_power_law(SPENT, loss, irreducible=True, delta=np.inf).law
    x = np.log(SPENT / 1e17)
    expected = optimize.least_squares(
        lambda t: np.log(t[0] + np.exp(t[1] - t[2] * x)) - np.log(loss),
        [1.0, 0.0, 0.1],
        xtol=1e-14,
        ftol=1e-14,
    ).x
    assert (found.E, found.gamma) == pytest.approx((expected[0], expected[2]), rel=1e-4)


def test_irreducible_loss_needs_an_infinite_amount() -> None:
    law = PowerLaw(2.0, 10.0, 0.2)
    assert law.spend_for(np.array([2.0, 1.0])).tolist() == [np.inf, np.inf]


@pytest.mark.parametrize(
    ("spent", "loss", "irreducible", "message"),
    [
        ([1e15], [3.0], False, "amounts spent=1: a power law needs at least 2"),
        ([1e15, 1.001e15, 1e16], [3.0, 3.0, 2.9], True, "amounts spent=2: a power law needs at least 3"),
        ([1e15, 1e16, 1e17], [2.9, 3.0, 3.1], False, "does not decrease"),
    ],
)
def test_amounts_that_do_not_determine_the_law_are_refused(
    spent: list[float], loss: list[float], irreducible: bool, message: str
) -> None:
    with pytest.raises(FieldError, match=message):
        fit_power_law(np.array(spent), np.array(loss), irreducible=irreducible)


def test_frontier_contains_the_undominated_runs() -> None:
    spent = np.array([1.0, 2.0, 3.0, 3.0, 4.0])
    loss = np.array([5.0, 4.0, 4.5, 3.0, 3.0])
    assert find_frontier(spent, loss).tolist() == [True, True, False, True, False]


def test_frontier_contains_one_of_several_equal_runs() -> None:
    spent, loss = np.array([2.0, 1.0, 1.0, 2.0]), np.array([3.0, 4.0, 4.0, 3.0])
    assert find_frontier(spent, loss).tolist() == [True, True, False, False]


def test_frontier_equals_its_definition() -> None:
    generator = np.random.default_rng(0)
    spent, loss = generator.integers(1, 40, (2, 300)).astype(float)
    dominated = [
        any(
            spent[other] <= spent[run]
            and loss[other] <= loss[run]
            and ((spent[other], loss[other]) != (spent[run], loss[run]) or other < run)
            for other in range(300)
        )
        for run in range(300)
    ]
    assert find_frontier(spent, loss).tolist() == [not each for each in dominated]


def test_frontier_of_many_runs_needs_little_memory() -> None:
    spent = np.arange(1.0, 200_001)
    tracemalloc.start()
    assert find_frontier(spent, -spent).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(spent)
