"""Comparison of the variants of a study."""

from __future__ import annotations

import dataclasses

from sas_megatron.scaling.comparison import compare_candidates, compare_variants
from sas_megatron.scaling.outcomes import AXES, SPENDING, LossCurve
from sas_megatron.scaling.verdicts import model_noise
from tests.scaling.synthetic import CHINCHILLA, Variant, draw_outcomes

BETTER = dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.05)


def test_complete_study_is_compared_in_every_way() -> None:
    curve = LossCurve("mha", "s0", "5", 0, "constant", 20, 7.0, (10, 20), (4.0, 3.0))
    (found,) = compare_variants(
        draw_outcomes({"mha": Variant(), "sas": Variant(BETTER, flops_factor=1.3)}),
        [curve, dataclasses.replace(curve, variant="sas", losses=(3.0, 2.0))],
        baseline="mha",
        candidates=["sas"],
    )
    assert [verdict.axis for verdict in found.verdicts] == list(AXES)
    assert list(found.gains) == list(SPENDING)
    assert all(any(gain.gain is not None for gain in gains) for gains in found.gains.values())
    assert [saving.saving for saving in found.savings] == [0.5]
    assert found.remarks == ()


def test_remarks_state_once_which_comparisons_are_not_possible() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()}, sizes=1, budgets=1)
    untimed = [dataclasses.replace(run, seconds=None) for run in outcomes]
    (found,) = compare_variants(untimed, baseline="mha", candidates=["sas"])
    assert found.gains == {}
    assert [remark.split(":")[0] for remark in found.remarks] == [
        "No gain in FLOPs, FLOPs of the causal half",
        "No gain in time",
    ]
    assert found.verdict("tokens").estimate is not None


def test_sign_that_depends_on_the_convention_of_flops_is_stated() -> None:
    # The candidate spends 20 % more FLOPs with all pairs of tokens, and 20 % fewer with the causal half.
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=1.2, causal_share=0.6)}, noise=0)
    (found,) = compare_variants(outcomes, baseline="mha", candidates=["sas"])
    full, half = found.verdict("flops").difference, found.verdict("causal_flops").difference
    assert full is not None
    assert half is not None
    assert half < 0 < full
    sign, gain = found.remarks
    assert sign.startswith("The sign at equal FLOPs depends on the convention of the attention FLOPs: +0.0")
    assert gain.startswith("Whether the compute-equivalent gain is above 1 depends on the convention")


def test_candidates_are_compared_with_each_other() -> None:
    names = ["k1", "k3", "k5"]
    equal = draw_outcomes(dict.fromkeys(["mha", *names], Variant()), budgets=1)
    (text,) = compare_candidates(equal, model_noise(equal), names)
    assert text.startswith(
        "Of k1, k3, k5, no two are shown to differ from each other at equal tokens (lowest p"
    )
    assert text.endswith("of 3 pairs).")
    variants = {**dict.fromkeys(["mha", "k1", "k3"], Variant()), "k5": Variant(BETTER)}
    outcomes = draw_outcomes(variants, budgets=1)
    (text,) = compare_candidates(outcomes, model_noise(outcomes), names)
    assert text.startswith("Of k1, k3, k5, these differ from each other at equal tokens: k1 and k5 (p")
    assert "k1 and k3" not in text
