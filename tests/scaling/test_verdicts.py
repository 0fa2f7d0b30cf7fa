"""Verdicts by axis: who wins, from studies in which it is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.outcomes import AXES, Axis, Outcome
from sas_megatron.scaling.verdicts import AxisVerdict, judge_axis, read_between
from tests.scaling.synthetic import CHINCHILLA, Variant, draw_outcomes

BETTER = dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.05)


def judge(outcomes: list[Outcome], axis: Axis) -> AxisVerdict:
    return judge_axis(outcomes, baseline="mha", candidate="sas", axis=axis)


def test_a_costly_improvement_wins_at_equal_tokens_and_loses_at_equal_flops() -> None:
    # 0.05 better, for 2.5 times the FLOPs, which buy more than that; and in half of the time.
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
    assert verdicts["tokens"].text.startswith("At equal tokens: sas wins: sas's loss is lower by 0.0")
    # The largest budget of each size lies beyond the baseline's FLOPs, the smallest below its seconds.
    assert verdicts["flops"].num_unread == 9
    assert "Left out are 9 runs of sas that no runs of mha lie around." in verdicts["flops"].text
    assert verdicts["seconds"].num_unread == 9


def test_what_is_read_between_runs_is_the_baselines_own_law() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=1.7)}, noise=0)
    mean = judge(outcomes, "flops").mean
    assert mean is not None
    expected = []
    for run in (run for run in outcomes if run.variant == "sas" and run.budget != "135"):
        tokens = run.flops / 6 / run.params
        base = CHINCHILLA.predict(np.array(float(run.params)), np.array(tokens))
        expected.append(run.known("loss") - float(base))
    # Budgets a factor of three apart; a straight line would be 0.006 too high.
    assert mean.difference == pytest.approx(np.mean(expected), abs=0.001)


def test_equal_variants_win_or_lose_as_often_as_chance_says() -> None:
    verdicts = [
        judge(
            draw_outcomes(
                {"mha": Variant(), "sas": Variant(flops_factor=1.4)}, seed=seed, sizes=2, noise=0.004
            ),
            "tokens",
        )
        for seed in range(200)
    ]
    assert 0.015 <= np.mean([verdict.result != "cannot be told" for verdict in verdicts]) <= 0.11


def test_intervals_at_equal_flops_hold_the_difference_as_often_as_they_say() -> None:
    # Read between budgets, so that cells share runs of the baseline.
    variants = {"mha": Variant(), "sas": Variant(flops_factor=1.7)}
    exact = judge(draw_outcomes(variants, sizes=2, noise=0), "flops").mean
    assert exact is not None
    held = 0
    for seed in range(200):
        mean = judge(draw_outcomes(variants, seed=seed, sizes=2, noise=0.004), "flops").mean
        assert mean is not None
        assert mean.interval is not None
        held += mean.interval[0] <= exact.difference <= mean.interval[1]
    assert 0.905 <= held / 200 <= 0.99


def test_pairs_of_seeds_tell_what_their_means_could_not() -> None:
    slightly = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.01))
    variants = {"mha": Variant(), "sas": slightly}
    outcomes = draw_outcomes(variants, noise=0.001, shared_noise=0.02)
    assert judge(outcomes, "tokens").result == "wins"
    renamed = [
        dataclasses.replace(run, seed=run.seed + 10) if run.variant == "sas" else run for run in outcomes
    ]
    unpaired = judge(renamed, "tokens")
    assert unpaired.result == "cannot be told"
    assert "The noise is assumed" in unpaired.text


def test_what_cannot_be_told_names_the_seeds_that_would() -> None:
    slightly = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.002))
    verdict = judge(draw_outcomes({"mha": Variant(), "sas": slightly}, noise=0.005), "tokens")
    assert verdict.result == "cannot be told"
    assert verdict.mean is not None
    needed = verdict.mean.seeds_that_would_tell
    assert needed is not None
    assert f"to tell a difference of that size in four studies of five would take {needed} seeds of each" in (
        verdict.text
    )


def test_single_seeds_of_one_variant_borrow_the_noise_of_the_other_and_say_so() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(BETTER)})
    one_seed = [run for run in outcomes if run.variant == "mha" or run.seed == 0]
    verdict = judge(one_seed, "tokens")
    assert verdict.result == "wins"
    assert "The noise is assumed to be that of the seeds that one variant repeats" in verdict.text
    none = judge([run for run in outcomes if run.seed == 0], "tokens")
    assert none.result == "cannot be told"
    assert "nothing says how much another seed would change" in none.text


def test_runs_that_diverged_are_counted() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(BETTER)})
    broken = [
        dataclasses.replace(run, loss=None) if (run.variant, run.seed) == ("sas", 1) else run
        for run in outcomes
    ]
    assert "Not in this are 12 runs of sas without a loss." in judge(broken, "tokens").text


def test_no_common_ground_is_no_comparison() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=100)})
    verdict = judge(outcomes, "flops")
    assert (verdict.result, verdict.mean, verdict.num_unread) == ("cannot be told", None, 36)
    assert verdict.text == (
        "At equal FLOPs: no comparison of sas and mha, since no runs of mha lie around its own."
    )
    untimed = [dataclasses.replace(run, seconds=None) for run in outcomes]
    assert judge(untimed, "seconds").mean is None


def test_a_variant_without_runs_is_refused() -> None:
    with pytest.raises(FieldError, match="variant=sas: has no run with a loss; choose among mha"):
        judge(draw_outcomes({"mha": Variant()}), "tokens")


def test_sizes_that_do_not_match_are_read_at_equal_parameters() -> None:
    outcomes = []
    for run in draw_outcomes({"mha": Variant(), "sas": Variant()}, noise=0, sizes=4):
        params = int(run.params * (1.5 if run.variant == "sas" else 1))
        tokens = int(1e7 * float(run.budget))
        loss = float(CHINCHILLA.predict(np.array(float(params)), np.array(float(tokens))))
        outcomes.append(dataclasses.replace(run, params=params, tokens=tokens, loss=loss))
    equal, unequal = judge(outcomes, "params"), judge(outcomes, "tokens")
    assert equal.mean is not None
    assert unequal.mean is not None
    # What is only size shows at equal tokens, and not at equal parameters.
    assert abs(equal.mean.difference) < 0.003 < 0.03 < -unequal.mean.difference
    assert equal.text.startswith("At equal parameters and tokens: ")
    # The largest of the candidate's sizes is beyond the baseline's.
    assert (len(equal.cells), equal.num_unread) == (12, 12)


def test_parameters_are_never_compared_at_unequal_tokens() -> None:
    outcomes = [
        dataclasses.replace(run, params=2 * run.params) if run.variant == "sas" else run
        for run in draw_outcomes({"mha": Variant(), "sas": Variant()}, sizes=2, budgets=2)
    ]
    assert judge(outcomes, "params").mean is None


def test_runs_that_stand_for_one_another_are_refused() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()})
    with pytest.raises(FieldError, match="variant=mha: has two runs of size s0, budget 5, seed 0"):
        judge([*outcomes, outcomes[0]], "tokens")
    with pytest.raises(FieldError, match="loss of mha s0 5 seed 0=nan: must be a positive number"):
        dataclasses.replace(outcomes[0], loss=float("nan"))


def test_reading_stays_within_the_runs() -> None:
    spent, losses = [1.0, 10.0, 100.0], [4.0, 3.0, 2.5]
    assert read_between(spent, losses, 9.95) == pytest.approx(3.0)
    assert read_between(spent, losses, 101.5) is None
    assert read_between(spent, losses, 0.9) is None
    assert read_between([1.0], [4.0], 1.005) == pytest.approx(4.0)
    # A run that spent the same again adds nothing, and divides by nothing.
    assert read_between([*spent, 10.0], [*losses, 3.0], 30.0) == pytest.approx(
        read_between(spent, losses, 30.0)
    )
    # Exact where the logarithm is a parabola.
    curve = [float(np.exp(1 + 0.3 * (np.log(x) - 5) ** 2 / 20)) for x in spent]
    assert read_between(spent, curve, 30.0) == pytest.approx(np.exp(1 + 0.3 * (np.log(30) - 5) ** 2 / 20))
