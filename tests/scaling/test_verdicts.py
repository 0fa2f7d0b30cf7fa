"""Verdicts by axis, for synthetic studies in which the better variant is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.outcomes import AXES, Axis, Outcome
from sas_megatron.scaling.verdicts import Verdict, interpolate_loss, judge_variant, judge_variants
from tests.scaling.synthetic import CHINCHILLA, Variant, draw_outcomes

BETTER = dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.05)


def judge(outcomes: list[Outcome], axis: Axis) -> Verdict:
    return judge_variant(outcomes, baseline="mha", candidate="sas", axis=axis)


def test_costly_improvement_wins_at_equal_tokens_and_loses_at_equal_flops() -> None:
    # The loss is lower by 0.05 for 2.5 times the FLOPs, which would gain more than that, in half the time.
    costly = Variant(BETTER, flops_factor=2.5, seconds_factor=0.2)
    outcomes = draw_outcomes({"mha": Variant(), "sas": costly}, noise=0.001)
    verdicts = {axis: judge(outcomes, axis) for axis in AXES}
    assert {axis: verdict.result for axis, verdict in verdicts.items()} == {
        "params": "wins",
        "tokens": "wins",
        "flops": "loses",
        "seconds": "wins",
    }
    for axis in ("params", "tokens"):
        mean = verdicts[axis].mean
        assert mean is not None
        assert mean.difference == pytest.approx(-0.05, abs=0.003)
        assert len(verdicts[axis].cells) == 12
    assert verdicts["tokens"].text.startswith("At equal tokens: sas wins: the loss of sas is lower by 0.0")
    # The largest budget of each size exceeds the baseline's FLOPs; the smallest is below its seconds.
    assert verdicts["flops"].num_unmatched == 9
    assert "Not included: 9 runs of sas that no runs of mha enclose." in verdicts["flops"].text
    assert verdicts["seconds"].num_unmatched == 9


def test_interpolated_losses_follow_the_law_of_the_baseline() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=1.7)}, noise=0)
    mean = judge(outcomes, "flops").mean
    assert mean is not None
    expected = []
    for run in (run for run in outcomes if run.variant == "sas" and run.budget != "135"):
        tokens = run.flops / 6 / run.params
        base = CHINCHILLA.predict(np.array(float(run.params)), np.array(tokens))
        expected.append(run.known("loss") - float(base))
    # The budgets differ by a factor of three; linear interpolation would be 0.006 too high.
    assert mean.difference == pytest.approx(np.mean(expected), abs=0.001)


def test_equal_variants_win_or_lose_at_the_significance_level() -> None:
    verdicts = [
        judge(
            draw_outcomes(
                {"mha": Variant(), "sas": Variant(flops_factor=1.4)}, seed=seed, sizes=2, noise=0.004
            ),
            "tokens",
        )
        for seed in range(200)
    ]
    assert 0.015 <= np.mean([verdict.result != "inconclusive" for verdict in verdicts]) <= 0.11


def test_budgets_of_one_trunk_are_not_independent_repetitions() -> None:
    results = [
        judge(
            draw_outcomes({"mha": Variant(), "sas": Variant()}, seed=seed, noise=0.001, trunk_noise=0.004),
            "tokens",
        ).result
        for seed in range(200)
    ]
    # The share would be 0.3 if the four budgets counted as four times the seeds.
    assert 0.015 <= np.mean([result != "inconclusive" for result in results]) <= 0.095


def test_six_equal_variants_win_no_more_often_than_a_single_one() -> None:
    names = [f"v{number}" for number in range(6)]
    separate, adjusted = 0, 0
    for seed in range(200):
        outcomes = draw_outcomes(dict.fromkeys(["mha", *names], Variant()), seed=seed, sizes=2, budgets=1)
        verdicts = judge_variants(outcomes, baseline="mha", candidates=names, axis="tokens")
        adjusted += any(verdict.result != "inconclusive" for verdict in verdicts)
        single = [judge_variant(outcomes, baseline="mha", candidate=name, axis="tokens") for name in names]
        separate += any(verdict.result != "inconclusive" for verdict in single)
    assert separate > 25
    assert adjusted <= 17


def test_verdict_states_that_it_would_be_significant_as_a_single_test() -> None:
    better = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.006))
    variants = {"mha": Variant(), "sas": better, "gqa": Variant(), "mla": Variant(), "tpa": Variant()}
    outcomes = draw_outcomes(variants, sizes=3, budgets=2)
    candidates = list(variants)[1:]
    sas, *_ = judge_variants(outcomes, baseline="mha", candidates=candidates, axis="tokens")
    alone = judge(outcomes, "tokens")
    assert (alone.result, sas.result, sas.num_comparisons) == ("wins", "inconclusive", 4)
    assert alone.p_value is not None
    assert sas.p_value == pytest.approx(4 * alone.p_value)
    assert "significant as a single test, but not as one of 4 comparisons (p = " in sas.text
    assert sas.mean is not None
    assert alone.mean is not None
    assert (sas.mean.seeds_needed or 0) > (alone.mean.seeds_needed or 0) >= 3


def test_intervals_at_equal_flops_have_their_nominal_coverage() -> None:
    # The losses are interpolated between budgets, so that cells share runs of the baseline.
    variants = {"mha": Variant(), "sas": Variant(flops_factor=1.7)}
    exact = judge(draw_outcomes(variants, sizes=2, noise=0), "flops").mean
    assert exact is not None
    covered = 0
    for seed in range(200):
        mean = judge(draw_outcomes(variants, seed=seed, sizes=2, noise=0.004), "flops").mean
        assert mean is not None
        assert mean.interval is not None
        covered += mean.interval[0] <= exact.difference <= mean.interval[1]
    assert 0.905 <= covered / 200 <= 0.99


def test_paired_seeds_detect_smaller_differences() -> None:
    slightly = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.01))
    variants = {"mha": Variant(), "sas": slightly}
    outcomes = draw_outcomes(variants, noise=0.001, shared_noise=0.02)
    assert judge(outcomes, "tokens").result == "wins"
    renamed = [
        dataclasses.replace(run, seed=run.seed + 10) if run.variant == "sas" else run for run in outcomes
    ]
    unpaired = judge(renamed, "tokens")
    assert unpaired.result == "inconclusive"
    assert "the noise is estimated from repeated seeds within one variant" in unpaired.text


def test_inconclusive_verdict_states_the_number_of_seeds_needed() -> None:
    slightly = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.002))
    verdict = judge(draw_outcomes({"mha": Variant(), "sas": slightly}, noise=0.005), "tokens")
    assert verdict.result == "inconclusive"
    assert verdict.mean is not None
    needed = verdict.mean.seeds_needed
    assert needed is not None
    assert f"detecting a difference of this size with a power of 80 % would take {needed} seeds of each" in (
        verdict.text
    )


def test_single_seeds_use_the_noise_of_the_other_variant() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(BETTER)})
    one_seed = [run for run in outcomes if run.variant == "mha" or run.seed == 0]
    verdict = judge(one_seed, "tokens")
    assert verdict.result == "wins"
    assert "the noise is estimated from repeated seeds within one variant and assumed" in verdict.text
    none = judge([run for run in outcomes if run.seed == 0], "tokens")
    assert none.result == "inconclusive"
    assert "the variation between seeds is unknown" in none.text


def test_runs_that_diverged_are_counted() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(BETTER)})
    broken = [
        dataclasses.replace(run, loss=None) if (run.variant, run.seed) == ("sas", 1) else run
        for run in outcomes
    ]
    assert "Not included: 12 runs of sas without a loss." in judge(broken, "tokens").text


def test_variants_without_overlapping_budgets_are_not_compared() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=100)})
    verdict = judge(outcomes, "flops")
    assert (verdict.result, verdict.mean, verdict.num_unmatched) == ("inconclusive", None, 36)
    assert verdict.text == (
        "At equal FLOPs: no comparison with mha, since its runs do not enclose the runs of sas."
    )
    untimed = [dataclasses.replace(run, seconds=None) for run in outcomes]
    assert judge(untimed, "seconds").mean is None


def test_variant_without_runs_is_refused() -> None:
    with pytest.raises(FieldError, match="variant=sas: has no run with a loss; choose among mha"):
        judge(draw_outcomes({"mha": Variant()}), "tokens")


def test_unmatched_sizes_are_interpolated_at_equal_parameters() -> None:
    outcomes = []
    for run in draw_outcomes({"mha": Variant(), "sas": Variant()}, noise=0, sizes=4):
        params = int(run.params * (1.5 if run.variant == "sas" else 1))
        tokens = int(1e7 * float(run.budget))
        loss = float(CHINCHILLA.predict(np.array(float(params)), np.array(float(tokens))))
        outcomes.append(dataclasses.replace(run, params=params, tokens=tokens, loss=loss))
    equal, unequal = judge(outcomes, "params"), judge(outcomes, "tokens")
    assert equal.mean is not None
    assert unequal.mean is not None
    # An effect of the size alone appears at equal tokens, but not at equal parameters.
    assert abs(equal.mean.difference) < 0.003 < 0.03 < -unequal.mean.difference
    assert equal.text.startswith("At equal parameters and tokens: ")
    # The candidate's largest size exceeds the baseline's.
    assert (len(equal.cells), equal.num_unmatched) == (12, 12)


def test_parameters_are_never_compared_at_unequal_tokens() -> None:
    outcomes = [
        dataclasses.replace(run, params=2 * run.params) if run.variant == "sas" else run
        for run in draw_outcomes({"mha": Variant(), "sas": Variant()}, sizes=2, budgets=2)
    ]
    assert judge(outcomes, "params").mean is None


def test_duplicate_runs_and_invalid_losses_are_refused() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()})
    with pytest.raises(FieldError, match="variant=mha: has two runs of size s0, budget 5, seed 0"):
        judge([*outcomes, outcomes[0]], "tokens")
    with pytest.raises(FieldError, match="loss of mha s0 5 seed 0=nan: must be a positive number"):
        dataclasses.replace(outcomes[0], loss=float("nan"))


def test_interpolation_stays_within_the_runs() -> None:
    spent, losses = [1.0, 10.0, 100.0], [4.0, 3.0, 2.5]
    assert interpolate_loss(spent, losses, 9.95) == pytest.approx(3.0)
    assert interpolate_loss(spent, losses, 101.5) is None
    assert interpolate_loss(spent, losses, 0.9) is None
    assert interpolate_loss([1.0], [4.0], 1.005) == pytest.approx(4.0)
    # A second run with the same budget changes nothing and does not cause a division by zero.
    assert interpolate_loss([*spent, 10.0], [*losses, 3.0], 30.0) == pytest.approx(
        interpolate_loss(spent, losses, 30.0)
    )
    # Exact if the logarithm of the loss is a parabola.
    curve = [float(np.exp(1 + 0.3 * (np.log(x) - 5) ** 2 / 20)) for x in spent]
    assert interpolate_loss(spent, curve, 30.0) == pytest.approx(np.exp(1 + 0.3 * (np.log(30) - 5) ** 2 / 20))
