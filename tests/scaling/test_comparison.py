"""Comparison of the variants of a study."""

from __future__ import annotations

import dataclasses

import pytest

from sas_megatron.scaling.comparison import compare_variants
from sas_megatron.scaling.outcomes import AXES, LossCurve
from tests.scaling.synthetic import CHINCHILLA, Variant, draw_outcomes


def test_complete_study_is_compared_in_every_way() -> None:
    better = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.05), flops_factor=1.3)
    curve = LossCurve("mha", "s0", "5", 0, "constant", 20, 7.0, (10, 20), (4.0, 3.0))
    (found,) = compare_variants(
        draw_outcomes({"mha": Variant(), "sas": better}),
        [curve, dataclasses.replace(curve, variant="sas", losses=(3.0, 2.0))],
        baseline="mha",
        candidates=["sas"],
        num_draws=60,
    )
    assert [verdict.axis for verdict in found.verdicts] == list(AXES)
    assert found.compute_gains is not None
    assert found.time_gains is not None
    assert any(gain.gain is not None for gain in found.compute_gains)
    assert found.irreducible is not None
    assert [saving.saving for saving in found.savings] == [0.5]
    assert found.remarks == ()


def test_remarks_state_which_comparisons_are_not_possible() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()}, sizes=1, budgets=1)
    untimed = [dataclasses.replace(run, seconds=None) for run in outcomes]
    (found,) = compare_variants(untimed, baseline="mha", candidates=["sas"], num_draws=60)
    assert (found.compute_gains, found.time_gains, found.irreducible) == (None, None, None)
    assert [remark.split(":")[0] for remark in found.remarks] == [
        "No compute-equivalent gain",
        "No time-equivalent gain",
        "No test of a shared irreducible loss",
    ]
    assert found.verdicts[1].mean is not None


def test_irreducible_loss_tests_of_several_variants_are_adjusted() -> None:
    lower = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.05))
    outcomes = draw_outcomes({"mha": Variant(), "gqa": Variant(), "sas": lower})
    (alone,) = compare_variants(outcomes, baseline="mha", candidates=["sas"], num_draws=50)
    adjusted = compare_variants(outcomes, baseline="mha", candidates=["gqa", "sas"], num_draws=50)
    tests = {comparison.candidate: comparison.irreducible for comparison in adjusted}
    assert alone.irreducible is not None
    assert tests["sas"] is not None
    assert tests["gqa"] is not None
    # The smaller of two p-values is doubled, and the other is at least as large.
    assert tests["sas"].p_value == pytest.approx(2 * alone.irreducible.p_value)
    assert tests["gqa"].p_value >= tests["sas"].p_value
