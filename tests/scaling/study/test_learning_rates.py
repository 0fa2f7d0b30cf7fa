"""Peak learning rates by published rules and by sweeps."""

from __future__ import annotations

import math

import pytest

from sas_megatron.config.errors import UserError
from sas_megatron.scaling.study.learning_rates import (
    Trial,
    extend_rates,
    find_best_rate,
    kaplan_rate,
    step_law_batch_tokens,
    step_law_rate,
)


def parabola(rate: float, *, best: float) -> Trial:
    return Trial(rate, 3.0 + 0.2 * (math.log(rate) - math.log(best)) ** 2)


def test_published_rules_give_the_published_numbers() -> None:
    # Kaplan et al. eq. D.1 at a million parameters: ln 10⁶ = 13.8155.
    assert kaplan_rate(10**6) == pytest.approx(0.003239 - 0.0001395 * 13.815511, rel=1e-7)
    # Li et al. eq. 1 at a billion parameters and 100 billion tokens, by logarithms.
    assert step_law_rate(10**9, 1e11) == pytest.approx(1.79 * 10 ** (-0.713 * 9 + 0.307 * 11), rel=1e-9)
    assert step_law_batch_tokens(1e11) == pytest.approx(0.58 * 10 ** (0.571 * 11), rel=1e-9)
    with pytest.raises(UserError, match=r"learning_rate\.rule=kaplan: gives -.* for 100,000,000,000 param"):
        kaplan_rate(10**11)


def test_best_rate_is_the_minimum_of_the_parabola() -> None:
    found = find_best_rate([parabola(rate, best=7e-4) for rate in (2e-3, 5e-4, 1e-3, 2.5e-4)])
    assert found.learning_rate == pytest.approx(7e-4)
    assert not found.at_edge
    # The steps between rates may be uneven.
    found = find_best_rate([parabola(rate, best=7e-4) for rate in (1e-4, 8e-4, 1e-3)])
    assert found.learning_rate == pytest.approx(7e-4)


def test_best_rate_at_the_edge_is_marked() -> None:
    found = find_best_rate([parabola(rate, best=7e-4) for rate in (1e-3, 2e-3, 4e-3)])
    assert (found.learning_rate, found.at_edge) == (1e-3, True)


def test_diverged_rates_are_not_chosen() -> None:
    trials = [parabola(1e-4, best=1e-3), parabola(5e-4, best=1e-3), Trial(1e-3, None)]
    found = find_best_rate(trials)
    assert (found.learning_rate, found.at_edge) == (5e-4, False)
    # The lower rate may have diverged instead.
    trials = [Trial(1e-4, None), parabola(5e-4, best=4e-4), parabola(1e-3, best=4e-4)]
    assert find_best_rate(trials).learning_rate == 5e-4
    with pytest.raises(UserError, match=r"every run of a sweep diverged \(0\.1, 0\.2\); try lower rates"):
        find_best_rate([Trial(0.1, None), Trial(0.2, None)])


def test_rates_are_extended_by_the_law_times_the_mean_factor() -> None:
    law = {"s": 4e-3, "m": 2e-3, "l": 1e-3, "xl": 1e-4}
    # Factors 2 and 8 have the geometric mean 4, which applies to all sizes.
    rates = extend_rates({"s": 8e-3, "m": 16e-3}, law)
    assert rates == pytest.approx({"s": 16e-3, "m": 8e-3, "l": 4e-3, "xl": 4e-4})
