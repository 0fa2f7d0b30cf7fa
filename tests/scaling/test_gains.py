"""Gains by budget: known ones come back within their bands, and nothing is read beyond the runs."""

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


def test_a_variant_that_costs_less_for_the_same_gains_the_factor() -> None:
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
def test_bands_hold_the_gain_as_often_as_they_say(num_draws: int) -> None:
    held = 0
    for seed in range(num_draws):
        variants = {"mha": Variant(), "sas": Variant(flops_factor=0.8)}
        outcomes = draw_outcomes(variants, seed=seed, sizes=4, noise=0.003)
        frontiers = fit_frontiers(outcomes, NAMES, axis="flops", num_draws=100, seed=seed)
        (found,) = find_gains(frontiers["mha"], frontiers["sas"], [3e18])
        assert found.gain_interval is not None
        held += found.gain_interval[0] <= 1.25 <= found.gain_interval[1]
    fewest, most = stats.binom.interval(0.999, num_draws, 0.95)
    assert fewest <= held <= most


def test_noise_that_variants_share_does_not_widen_a_band() -> None:
    def width(shared: float, own: float) -> float:
        outcomes = draw_outcomes(
            {"mha": Variant(), "sas": Variant(flops_factor=0.8)}, noise=own, shared_noise=shared
        )
        frontiers = fit_frontiers(outcomes, NAMES, axis="flops", num_draws=200)
        (found,) = find_gains(frontiers["mha"], frontiers["sas"], [3e18])
        assert found.difference_interval is not None
        return found.difference_interval[1] - found.difference_interval[0]

    assert width(0.01, 0.0005) < width(0.0, 0.01) / 3


def test_budgets_beyond_the_runs_get_a_reason_and_no_number() -> None:
    better = dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.1)
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(better)}, noise=0)
    frontiers = fit_frontiers(outcomes, NAMES, axis="flops", num_draws=60)
    mha, sas = frontiers["mha"], frontiers["sas"]
    below, last, above = find_gains(mha, sas, [sas.lowest / 2, sas.highest, sas.highest * 2])
    for outside in (below, above):
        assert (outside.gain, outside.difference) == (None, None)
        assert outside.reason is not None
        assert "sas's runs spend between" in outside.reason
    # Measured at its end, but the baseline never gets there.
    assert last.gain is None
    assert last.difference == pytest.approx(-0.1, abs=0.01)
    assert last.reason == (
        "mha would reach sas's loss with more FLOPs than any of its runs spent; it is not read beyond them."
    )


def test_runs_that_others_beat_for_less_are_not_on_the_frontier() -> None:
    outcomes = draw_outcomes({"mha": Variant()}, noise=0)
    wasted = dataclasses.replace(outcomes[-1], size="wasted", flops=outcomes[-1].flops / 2, loss=9.0)
    plain = fit_frontiers(outcomes, ["mha"], axis="flops", num_draws=60)["mha"]
    with_waste = fit_frontiers([*outcomes, wasted], ["mha"], axis="flops", num_draws=60)["mha"]
    assert dataclasses.astuple(with_waste.law) == pytest.approx(dataclasses.astuple(plain.law), rel=1e-9)
    assert with_waste.num_levels == plain.num_levels


def test_units_of_flops_change_no_gain() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=0.8)})
    scaled = [dataclasses.replace(run, flops=run.flops / 1e18) for run in outcomes]
    gains = []
    for runs, budget in ((outcomes, 3e18), (scaled, 3.0)):
        frontiers = fit_frontiers(runs, NAMES, axis="flops", num_draws=60)
        gains.append(find_gains(frontiers["mha"], frontiers["sas"], [budget])[0])
    assert gains[1].gain == pytest.approx(gains[0].gain, rel=1e-6)
    assert gains[1].gain_interval == pytest.approx(gains[0].gain_interval, rel=1e-4)


def test_runs_that_tell_no_frontier_are_refused() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()}, sizes=1, budgets=1)
    with pytest.raises(FieldError, match="needs at least 2"):
        fit_frontiers(outcomes, NAMES, axis="flops", num_draws=60)
    untimed = [dataclasses.replace(run, seconds=None) for run in outcomes]
    with pytest.raises(FieldError, match="no run with measured seconds"):
        fit_frontiers(untimed, NAMES, axis="seconds", num_draws=60)
