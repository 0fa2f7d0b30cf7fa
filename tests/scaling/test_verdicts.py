"""Verdicts by axis, for synthetic studies in which the better variant is known."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.outcomes import AXES, Axis, Outcome
from sas_megatron.scaling.significance import Estimate
from sas_megatron.scaling.verdicts import UNKNOWN_TIME_ERROR, Verdict, judge_variants
from tests.scaling.synthetic import CHINCHILLA, Variant, draw_outcomes

VARIANTS, SIZES = ("mha", "sas"), ("s0", "s1", "s2")
BETTER = dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.05)


def judge(outcomes: list[Outcome], axis: Axis) -> Verdict:
    return judge_variants(outcomes, baseline="mha", candidates=["sas"], axis=axis)[0]


def estimate(outcomes: list[Outcome], axis: Axis) -> Estimate:
    found = judge(outcomes, axis).estimate
    assert found is not None
    return found


def test_costly_improvement_wins_at_equal_tokens_and_loses_at_equal_flops() -> None:
    # The loss is lower by 0.05 for 2.5 times the FLOPs, which would gain more than that, in half the time.
    costly = Variant(BETTER, flops_factor=2.5, seconds_factor=0.2, causal_share=0.36)
    outcomes = draw_outcomes({"mha": Variant(), "sas": costly}, noise=0.001)
    verdicts = {axis: judge(outcomes, axis) for axis in AXES}
    assert {axis: verdict.result for axis, verdict in verdicts.items()} == {
        "params": "wins",
        "tokens": "wins",
        "flops": "loses",
        "causal_flops": "wins",
        "seconds": "wins",
    }
    for axis in ("params", "tokens"):
        assert verdicts[axis].difference == pytest.approx(-0.05, abs=0.003)
        assert len(verdicts[axis].cells) == 12
    assert verdicts["tokens"].text.startswith("At equal tokens: sas wins: the loss of sas is lower by 0.0")
    assert "2 degrees of freedom" in verdicts["tokens"].text
    # The largest budget of each size exceeds the baseline's FLOPs; the smallest is below its seconds.
    assert verdicts["flops"].num_unmatched == 3
    assert "Not included: 3 cells of sas that no runs of mha enclose." in verdicts["flops"].text
    assert verdicts["seconds"].num_unmatched == 3


def test_interpolated_losses_follow_the_law_of_the_baseline() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=1.7)}, noise=0)
    expected = []
    for run in (run for run in outcomes if run.variant == "sas" and run.budget != "135"):
        tokens = run.flops / 6 / run.params
        base = CHINCHILLA.predict(np.array(float(run.params)), np.array(tokens))
        expected.append(run.known("loss") - float(base))
    # The budgets differ by a factor of three; linear interpolation would be 0.006 too high.
    assert estimate(outcomes, "flops").difference == pytest.approx(np.mean(expected), abs=0.001)


def test_equal_variants_win_or_lose_at_the_significance_level() -> None:
    variants = {"mha": Variant(), "sas": Variant(flops_factor=1.4)}
    studies = [draw_outcomes(variants, seed=seed, sizes=2, trunk_noise=0.004) for seed in range(200)]
    # The share would be 0.3 at equal tokens if the four budgets counted as four times the seeds.
    significant = np.mean([judge(study, "tokens").result != "inconclusive" for study in studies])
    assert 0.015 <= significant <= 0.095


def test_six_equal_variants_win_no_more_often_than_a_single_one() -> None:
    names = [f"v{number}" for number in range(6)]
    separate, adjusted = 0, 0
    for seed in range(200):
        outcomes = draw_outcomes(dict.fromkeys(["mha", *names], Variant()), seed=seed, sizes=2, budgets=1)
        verdicts = judge_variants(outcomes, baseline="mha", candidates=names, axis="tokens")
        adjusted += any(verdict.result != "inconclusive" for verdict in verdicts)
        p_values = [verdict.estimate.p_value for verdict in verdicts if verdict.estimate is not None]
        separate += any(p_value is not None and p_value < 0.05 for p_value in p_values)
    assert separate > 25
    assert adjusted <= 17


def test_noise_is_pooled_over_variants_that_are_not_compared() -> None:
    variants = dict.fromkeys(["mha", "sas", "gqa", "mla"], Variant())
    outcomes = draw_outcomes(variants, sizes=2, budgets=2)
    alone = estimate([run for run in outcomes if run.variant in ("mha", "sas")], "tokens")
    pooled = estimate(outcomes, "tokens")
    assert alone.degrees == pytest.approx(2)
    assert pooled.degrees == pytest.approx(6)


def test_verdict_states_that_it_would_be_significant_as_a_single_test() -> None:
    better = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.006))
    variants = {"mha": Variant(), "sas": better, "gqa": Variant(), "mla": Variant(), "tpa": Variant()}
    outcomes = draw_outcomes(variants, sizes=3, budgets=2, noise=0.003)
    candidates = list(variants)[1:]
    sas, *_ = judge_variants(outcomes, baseline="mha", candidates=candidates, axis="tokens")
    assert (sas.result, sas.num_comparisons) == ("inconclusive", 4)
    assert sas.estimate is not None
    assert sas.estimate.p_value is not None
    assert sas.estimate.p_value < 0.05
    assert sas.p_value == pytest.approx(4 * sas.estimate.p_value)
    assert "significant as a single test (p = " in sas.text
    assert "but not as one of 4 comparisons; detecting a difference of this size" in sas.text
    assert (sas.seeds_needed or 0) >= 3


def test_intervals_at_equal_flops_have_their_nominal_coverage() -> None:
    # The losses are interpolated between budgets, so that cells share runs of the baseline.
    variants = {"mha": Variant(), "sas": Variant(flops_factor=1.7)}
    noiseless = judge(draw_outcomes(variants, sizes=2, noise=0), "flops")
    exact = {part.budget: part.estimate.difference for part in noiseless.by_budget}
    covered = 0
    for seed in range(200):
        verdict = judge(draw_outcomes(variants, seed=seed, sizes=2, noise=0.004), "flops")
        assert verdict.estimate is not None
        assert verdict.estimate.interval is not None
        # The difference depends on the budget: the interval is that of the mean with these weights.
        mean = sum(part.share * exact[part.budget] for part in verdict.by_budget)
        covered += verdict.estimate.interval[0] <= mean <= verdict.estimate.interval[1]
    assert 0.905 <= covered / 200 <= 0.99


def draw_isoflops(factor: float, **options: object) -> list[Outcome]:
    """Draw a study whose sizes enclose the best size at its budgets; `factor` multiplies the FLOPs of sas."""
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(flops_factor=factor)}, sizes=7, **options)  # type: ignore[arg-type]
    resized = []
    for run in outcomes:
        params = 1e9 * 2 ** (int(run.size[1:]) - 3)
        flops = 1e20 * 3 ** ["5", "15", "45", "135"].index(run.budget)
        tokens = flops / 6 / params / (factor if run.variant == "sas" else 1)
        noise = run.known("loss") / float(CHINCHILLA.predict(np.array(run.params), np.array(run.tokens)))
        loss = float(CHINCHILLA.predict(np.array(params), np.array(tokens))) * noise
        resized.append(
            dataclasses.replace(
                run, params=int(params), tokens=int(tokens), flops=flops, causal_flops=flops, loss=loss
            )
        )
    return resized


def test_best_sizes_are_compared_where_the_sizes_enclose_them() -> None:
    verdict = judge(draw_isoflops(2.0, noise=0.0), "flops")
    exact = []
    for flops in (1e20, 3e20, 9e20, 27e20):
        sizes = np.geomspace(1e8, 1e10, 2000)
        exact.append(
            CHINCHILLA.predict(sizes, flops / 12 / sizes).min()
            - CHINCHILLA.predict(sizes, flops / 6 / sizes).min()
        )
    assert [cell.size for cell in verdict.cells] == [None] * 4
    assert [cell.difference for cell in verdict.cells] == pytest.approx(exact, abs=0.002)
    assert verdict.same_size is not None
    # At the same size the difference is larger: the candidate's large sizes have too few tokens.
    assert verdict.same_size.difference > np.mean(exact) + 0.005
    assert "each at its best size" in verdict.text
    assert "at the same size it differs by +" in verdict.text


def test_equal_variants_win_or_lose_at_best_sizes_at_the_significance_level() -> None:
    verdicts = [judge(draw_isoflops(1.0, seed=seed, noise=0.004), "flops") for seed in range(60)]
    assert np.mean([verdict.result != "inconclusive" for verdict in verdicts]) <= 0.12


def test_same_sizes_are_compared_where_the_best_size_is_at_the_edge() -> None:
    verdict = judge(draw_outcomes({"mha": Variant(), "sas": Variant(BETTER)}), "flops")
    assert verdict.same_size is None
    assert {cell.size for cell in verdict.cells} == {"s0", "s1", "s2"}


def test_error_of_step_times_widens_the_interval_at_equal_time() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(seconds_factor=1.5)}, noise=0.001)
    assert UNKNOWN_TIME_ERROR in judge(outcomes, "seconds").text
    exact, measured = (
        [dataclasses.replace(run, seconds_error=error) for run in outcomes] for error in (0.0, 0.1)
    )
    without, found = estimate(exact, "seconds"), estimate(measured, "seconds")
    assert UNKNOWN_TIME_ERROR not in judge(measured, "seconds").text
    assert without.error is not None
    assert found.error is not None
    # The spread of the difference if the step time of each variant and size is measured again.
    generator, differences = np.random.default_rng(3), []
    for _ in range(100):
        factors = {cell: np.exp(0.1 * generator.standard_normal()) for cell in product(VARIANTS, SIZES)}
        again = [
            dataclasses.replace(run, seconds=run.known("seconds") * factors[run.variant, run.size])
            for run in exact
        ]
        differences.append(estimate(again, "seconds").difference)
    assert (found.error**2 - without.error**2) ** 0.5 == pytest.approx(np.std(differences), rel=0.3)
    assert estimate(measured, "tokens") == estimate(exact, "tokens")


def test_paired_seeds_detect_smaller_differences() -> None:
    slightly = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.01))
    variants = {"mha": Variant(), "sas": slightly}
    outcomes = draw_outcomes(variants, noise=0.001, shared_noise=0.02)
    assert judge(outcomes, "tokens").result == "wins"
    renamed = [
        dataclasses.replace(run, seed=run.seed + 10) if run.variant == "sas" else run for run in outcomes
    ]
    assert judge(renamed, "tokens").result == "inconclusive"


def test_inconclusive_verdict_states_the_number_of_seeds_needed() -> None:
    slightly = Variant(dataclasses.replace(CHINCHILLA, E=CHINCHILLA.E - 0.002))
    verdict = judge(draw_outcomes({"mha": Variant(), "sas": slightly}, noise=0.005), "tokens")
    assert verdict.result == "inconclusive"
    needed = verdict.seeds_needed
    assert needed is not None
    assert f"detecting a difference of this size with a power of 80 % would take {needed} seeds of each" in (
        verdict.text
    )


def test_variant_with_one_seed_uses_the_noise_of_the_others() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant(BETTER)})
    one_seed = [run for run in outcomes if run.variant == "mha" or run.seed == 0]
    assert judge(one_seed, "tokens").result == "wins"
    mean_of_baseline = {
        cell: np.mean([run.known("loss") for run in outcomes if run.variant == "mha" and run.cell == cell])
        for cell in {run.cell for run in outcomes}
    }
    for cell in judge(one_seed, "tokens").cells:
        (run,) = (run for run in one_seed if run.variant == "sas" and run.cell == (cell.size, cell.budget))
        assert cell.difference == pytest.approx(run.known("loss") - mean_of_baseline[run.cell])
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
    assert (verdict.result, verdict.estimate, verdict.num_unmatched) == ("inconclusive", None, 12)
    assert verdict.text == (
        "At equal FLOPs: no comparison with mha, since its runs do not enclose the runs of sas."
    )
    untimed = [dataclasses.replace(run, seconds=None) for run in outcomes]
    assert judge(untimed, "seconds").estimate is None


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
    assert equal.difference is not None
    assert unequal.difference is not None
    # An effect of the size alone appears at equal tokens, but not at equal parameters.
    assert abs(equal.difference) < 0.003 < 0.03 < -unequal.difference
    assert equal.text.startswith("At equal parameters and tokens: ")
    # The candidate's largest size exceeds the baseline's.
    assert (len(equal.cells), equal.num_unmatched) == (12, 4)


def test_parameters_are_never_compared_at_unequal_tokens() -> None:
    outcomes = [
        dataclasses.replace(run, params=2 * run.params) if run.variant == "sas" else run
        for run in draw_outcomes({"mha": Variant(), "sas": Variant()}, sizes=2, budgets=2)
    ]
    assert judge(outcomes, "params").estimate is None


def test_duplicate_runs_and_invalid_losses_are_refused() -> None:
    outcomes = draw_outcomes({"mha": Variant(), "sas": Variant()})
    with pytest.raises(FieldError, match="variant=mha: has two runs of size s0, budget 5, seed 0"):
        judge([*outcomes, outcomes[0]], "tokens")
    with pytest.raises(FieldError, match="loss of mha s0 5 seed 0=nan: must be a positive number"):
        dataclasses.replace(outcomes[0], loss=float("nan"))
