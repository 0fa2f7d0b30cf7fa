"""Gains by budget: known gains are within their intervals, and losses are not extrapolated."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.gains import Frontier, Gain, find_gain, fit_frontier
from sas_megatron.scaling.outcomes import Outcome, Spending
from sas_megatron.scaling.verdicts import model_noise
from tests.scaling.synthetic import CHINCHILLA, Variant, draw_outcomes
from tests.selection import draws


def fit(outcomes: Sequence[Outcome], axis: Spending = "flops") -> tuple[Frontier, Frontier]:
    noise = model_noise(outcomes)
    mha, sas = (fit_frontier(outcomes, noise, variant, axis=axis) for variant in ("mha", "sas"))
    return mha, sas


def gain(outcomes: Sequence[Outcome], budget: float, axis: Spending = "flops") -> Gain:
    return find_gain(*fit(outcomes, axis), model_noise(outcomes), budget)


def test_cheaper_variant_gains_its_cost_factor() -> None:
    cheaper = Variant(flops_factor=0.8, seconds_factor=2.5, causal_share=0.45)
    outcomes = draw_outcomes({"mha": Variant(), "sas": cheaper}, noise=0)
    factors: dict[Spending, float] = {"flops": 0.8, "causal_flops": 0.4, "seconds": 2.0}
    for axis, factor in factors.items():
        mha, sas = fit(outcomes, axis)
        lowest, highest = min(mha.spent.values()), max(mha.spent.values())
        assert min(sas.spent.values()) / lowest == pytest.approx(factor)
        for budget in np.geomspace(lowest * 3, highest / 3, 4).tolist():
            found = gain(outcomes, budget, axis)
            assert found.gain == pytest.approx(1 / factor, rel=1e-4)
            assert found.reason is None


@draws(40, 300)
def test_intervals_have_their_nominal_coverage(num_draws: int) -> None:
    covered = 0
    for seed in range(num_draws):
        variants = {"mha": Variant(), "sas": Variant(flops_factor=0.8)}
        found = gain(draw_outcomes(variants, seed=seed, noise=0.003, trunk_noise=0.003), 3e18)
        assert found.interval is not None
        covered += found.interval[0] <= 1.25 <= found.interval[1]
    fewest, most = stats.binom.interval(0.999, num_draws, 0.95)
    assert fewest <= covered <= most


def test_weights_of_cells_equal_the_change_of_a_fit_to_changed_losses() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()}, noise=0.001, sizes=4)
    frontier = fit(outcomes)[0]
    predicted = float(frontier.law.predict(3e18))
    for cell, weight in list(frontier.weigh_cells(3e18).items())[::3]:
        changed = [
            dataclasses.replace(run, loss=run.known("loss") + 1e-5)
            if (run.variant, run.cell) == ("mha", cell)
            else run
            for run in outcomes
        ]
        difference = float(fit(changed)[0].law.predict(3e18)) - predicted
        assert weight == pytest.approx(difference / 1e-5, abs=0.002)


def test_noise_that_variants_share_does_not_widen_an_interval() -> None:
    def width(shared: float, separate: float) -> float:
        variants = {"mha": Variant(), "sas": Variant(flops_factor=0.8)}
        found = gain(draw_outcomes(variants, noise=separate, shared_noise=shared), 3e18)
        assert found.interval is not None
        return found.interval[1] - found.interval[0]

    assert width(0.01, 0.0005) < width(0.0, 0.01) / 3


def test_error_of_step_times_widens_an_interval() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()}, noise=0.0003)
    widths = []
    for error in (0.0, 0.1):
        found = gain([dataclasses.replace(run, seconds_error=error) for run in outcomes], 3e3, "seconds")
        assert found.interval is not None
        widths.append(np.log(found.interval[1] / found.interval[0]))
    # 1.96 times the error of a ratio of two times on each side.
    assert widths[1] >= 2 * 1.96 * 0.1 * 2**0.5 * 0.9
    assert widths[0] < widths[1] / 2


def test_budget_outside_the_runs_has_a_reason_instead_of_a_gain() -> None:
    better = dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.1)
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(better)}, noise=0)
    sas = fit(outcomes)[1]
    lowest, highest = min(sas.spent.values()), max(sas.spent.values())
    for outside in (gain(outcomes, lowest / 2), gain(outcomes, highest * 2)):
        assert outside.gain is None
        assert outside.reason is not None
        assert "the runs of sas are between" in outside.reason
    # The largest budget is measured, but the baseline never reaches its loss.
    last = gain(outcomes, highest)
    assert last.gain is None
    assert last.reason == (
        "mha would reach the loss of sas with more FLOPs than any of its runs; losses are not extrapolated."
    )


def test_dominated_runs_are_not_on_the_frontier() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()}, noise=0)
    last = max((run for run in outcomes if run.variant == "mha"), key=lambda run: run.flops)
    wasted = dataclasses.replace(last, size="wasted", flops=last.flops / 2, loss=9.0)
    plain, with_waste = fit(outcomes)[0], fit([*outcomes, wasted])[0]
    assert dataclasses.astuple(with_waste.law) == pytest.approx(dataclasses.astuple(plain.law), rel=1e-9)
    assert with_waste.spent == plain.spent


def test_gains_are_independent_of_the_unit_of_flops() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=0.8)})
    scaled = [dataclasses.replace(run, flops=run.flops / 1e18) for run in outcomes]
    large, small = gain(outcomes, 3e18), gain(scaled, 3.0)
    assert small.gain == pytest.approx(large.gain, rel=1e-6)
    assert small.interval == pytest.approx(large.interval, rel=1e-4)


def test_runs_that_do_not_determine_a_frontier_are_refused() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()}, sizes=1, budgets=1)
    with pytest.raises(FieldError, match="needs at least 2"):
        fit(outcomes)
    untimed = [dataclasses.replace(run, seconds=None) for run in outcomes]
    with pytest.raises(FieldError, match="no run with measured seconds"):
        fit(untimed, "seconds")
