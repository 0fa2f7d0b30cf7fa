"""Gains by budget: known gains are within their bands, and losses are not extrapolated."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.gains import find_gains, fit_frontiers
from tests.scaling.synthetic import CHINCHILLA, Variant, draw_outcomes
from tests.selection import draws

NAMES = ("mha", "sas")


def test_cheaper_variant_gains_its_cost_factor() -> None:
    outcomes = draw_outcomes(
        {"mha": Variant(), "sas": Variant(flops_factor=0.8, seconds_factor=2.5)}, noise=0
    )
    for axis, factor in (("flops", 0.8), ("seconds", 2.0)):
        frontiers = fit_frontiers(outcomes, NAMES, axis=axis, num_draws=60)  # type: ignore[arg-type]
        mha, sas = frontiers["mha"], frontiers["sas"]
        assert sas.lowest / mha.lowest == pytest.approx(factor)
        middle = np.geomspace(mha.lowest * 3, mha.highest / 3, 4).tolist()
        for found in find_gains(mha, sas, middle):
            assert found.gain == pytest.approx(1 / factor, rel=1e-4)
            assert found.reason is None


@draws(30, 100)
def test_bands_have_their_nominal_coverage(num_draws: int) -> None:
    covered = 0
    for seed in range(num_draws):
        variants = {"mha": Variant(), "sas": Variant(flops_factor=0.8)}
        outcomes = draw_outcomes(variants, seed=seed, sizes=4, noise=0.003)
        frontiers = fit_frontiers(outcomes, NAMES, axis="flops", num_draws=100, seed=seed)
        (found,) = find_gains(frontiers["mha"], frontiers["sas"], [3e18])
        assert found.gain_interval is not None
        covered += found.gain_interval[0] <= 1.25 <= found.gain_interval[1]
    fewest, most = stats.binom.interval(0.999, num_draws, 0.95)
    assert fewest <= covered <= most


def test_shared_noise_does_not_widen_a_band() -> None:
    def width(shared: float, separate: float) -> float:
        outcomes = draw_outcomes(
            {"mha": Variant(), "sas": Variant(flops_factor=0.8)}, noise=separate, shared_noise=shared
        )
        frontiers = fit_frontiers(outcomes, NAMES, axis="flops", num_draws=200)
        (found,) = find_gains(frontiers["mha"], frontiers["sas"], [3e18])
        assert found.difference_interval is not None
        return found.difference_interval[1] - found.difference_interval[0]

    assert width(0.01, 0.0005) < width(0.0, 0.01) / 3


def test_budget_outside_the_runs_has_a_reason_instead_of_a_gain() -> None:
    better = dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.1)
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(better)}, noise=0)
    frontiers = fit_frontiers(outcomes, NAMES, axis="flops", num_draws=60)
    mha, sas = frontiers["mha"], frontiers["sas"]
    below, last, above = find_gains(mha, sas, [sas.lowest / 2, sas.highest, sas.highest * 2])
    for outside in (below, above):
        assert (outside.gain, outside.difference) == (None, None)
        assert outside.reason is not None
        assert "the runs of sas are between" in outside.reason
    # The largest budget is measured, but the baseline never reaches its loss.
    assert last.gain is None
    assert last.difference == pytest.approx(-0.1, abs=0.01)
    assert last.reason == (
        "mha would reach the loss of sas with more FLOPs than any of its runs; losses are not extrapolated."
    )


def test_dominated_runs_are_not_on_the_frontier() -> None:
    outcomes = draw_outcomes({"mha": Variant()}, noise=0)
    wasted = dataclasses.replace(outcomes[-1], size="wasted", flops=outcomes[-1].flops / 2, loss=9.0)
    plain = fit_frontiers(outcomes, ["mha"], axis="flops", num_draws=60)["mha"]
    with_waste = fit_frontiers([*outcomes, wasted], ["mha"], axis="flops", num_draws=60)["mha"]
    assert dataclasses.astuple(with_waste.law) == pytest.approx(dataclasses.astuple(plain.law), rel=1e-9)
    assert with_waste.num_levels == plain.num_levels


def test_gains_are_independent_of_the_unit_of_flops() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=0.8)})
    scaled = [dataclasses.replace(run, flops=run.flops / 1e18) for run in outcomes]
    gains = []
    for runs, budget in ((outcomes, 3e18), (scaled, 3.0)):
        frontiers = fit_frontiers(runs, NAMES, axis="flops", num_draws=60)
        gains.append(find_gains(frontiers["mha"], frontiers["sas"], [budget])[0])
    assert gains[1].gain == pytest.approx(gains[0].gain, rel=1e-6)
    assert gains[1].gain_interval == pytest.approx(gains[0].gain_interval, rel=1e-4)


def test_runs_that_do_not_determine_a_frontier_are_refused() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()}, sizes=1, budgets=1)
    with pytest.raises(FieldError, match="needs at least 2"):
        fit_frontiers(outcomes, NAMES, axis="flops", num_draws=60)
    untimed = [dataclasses.replace(run, seconds=None) for run in outcomes]
    with pytest.raises(FieldError, match="no run with measured seconds"):
        fit_frontiers(untimed, NAMES, axis="seconds", num_draws=60)
