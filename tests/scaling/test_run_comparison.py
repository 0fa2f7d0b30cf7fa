"""Comparison of single runs, read from their validation curves."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sas_megatron.config.errors import UserError
from sas_megatron.scaling.curve_verdicts import CURVE_AXES, find_shared_budget, judge_curves, read_loss
from sas_megatron.scaling.outcomes import Axis
from sas_megatron.scaling.run_comparison import LINEAR_INTERPOLATION, ONE_SEED, compare_runs
from sas_megatron.scaling.runs import Run, ValidationPoint, load_run
from sas_megatron.scaling.verdicts import Reading
from tests.scaling.conftest import WriteRun

GROUPED = {"attention__kind": "gqa", "attention__num_kv_heads": 2}


@pytest.fixture
def pair(write_run: WriteRun) -> tuple[Run, Run]:
    """A baseline, and a candidate whose step takes 1.2 times the FLOPs and 1.6 times the time."""
    base = write_run("mha", losses={30: 5.5, 60: 4.75, 90: 4.625})
    candidate = write_run(
        "gqa",
        losses={30: 5.25, 60: 4.5, 90: 4.375},
        flops_per_token=1200.0,
        step_seconds=0.8,
        config=GROUPED,
        summary={"parameters": {"embedding": 46080, "rest": 51152}, "validation_perplexity": 79.44},
    )
    return load_run(base), load_run(candidate)


def test_measures_equal_a_calculation_by_hand(pair: tuple[Run, Run]) -> None:
    base, row = compare_runs(pair).rows
    assert (base.name, base.attention, base.parameters) == ("mha", "mha", 95328)
    assert (base.parameters_ratio, base.final_validation_loss_difference) == (1.0, 0.0)
    assert (row.name, row.attention, row.parameters) == ("gqa", "gqa", 97232)
    assert row.parameters_ratio == pytest.approx(97232 / 95328)
    assert row.training_flops_per_token == pytest.approx(1200.0)
    assert row.training_flops_per_token_ratio == pytest.approx(1.2)
    assert row.median_step_seconds_ratio == pytest.approx(1.6)
    # 90 steps of 7 × 51 tokens in 72 seconds.
    assert row.tokens_per_second == pytest.approx(446.25)
    assert row.training_seconds == pytest.approx(72.0)
    assert row.final_validation_loss_difference == -0.25
    assert row.validation_perplexity == 79.44
    assert row.peak_memory_bytes == 3145728


@pytest.mark.parametrize(
    ("axis", "budget", "reading", "difference"),
    [
        ("tokens", 32130, Reading(4.375, (90, 90)), -0.25),
        # 1.2 times the FLOPs per step: 90 steps of the baseline equal 75 steps, halfway between 60 and 90.
        ("flops", 32130e3, Reading(4.4375, (60, 90)), -0.1875),
        # 45 s allow 56.25 steps: 5.25 − 0.75 · 26.25 / 30.
        ("seconds", 45.0, Reading(4.59375, (30, 60)), -0.03125),
    ],
)
def test_each_axis_is_read_at_the_largest_budget_that_both_runs_reached(
    pair: tuple[Run, Run], axis: Axis, budget: float, reading: Reading, difference: float
) -> None:
    verdict = judge_curves(*pair, axis)
    assert verdict.budget == budget
    base, candidate = verdict.readings
    assert base == Reading(4.625, (90, 90))
    assert candidate is not None
    assert candidate.loss == pytest.approx(reading.loss, abs=1e-12)
    assert candidate.steps == reading.steps
    assert verdict.difference == pytest.approx(difference, abs=1e-12)
    assert verdict.lower == "gqa"


def test_verdicts_are_phrased_with_budgets_and_losses(pair: tuple[Run, Run]) -> None:
    assert [verdict.text for verdict in compare_runs(pair).verdicts] == [
        "At equal tokens (32,130 tokens): gqa 4.3750, mha 4.6250; gqa is lower by 0.2500.",
        "At equal FLOPs (3.21 × 10⁷ FLOPs): gqa 4.4375, mha 4.6250; gqa is lower by 0.1875. "
        "gqa is read between its evaluations at steps 60 and 90 of 90, before the end of its learning rate "
        "decay, which increases its loss.",
        "At equal FLOPs of the causal half (3.21 × 10⁷ FLOPs): gqa 4.4375, mha 4.6250; gqa is lower by "
        "0.1875. gqa is read between its evaluations at steps 60 and 90 of 90, before the end of its "
        "learning rate decay, which increases its loss.",
        "At equal time (45 s of training): gqa 4.5938, mha 4.6250; gqa is lower by 0.0312. "
        "gqa is read between its evaluations at steps 30 and 60 of 90, before the end of its learning rate "
        "decay, which increases its loss.",
    ]


def test_comparison_always_remarks_on_the_single_seed(pair: tuple[Run, Run]) -> None:
    assert compare_runs(pair).remarks[-1] == ONE_SEED
    assert not any(character.isdigit() for character in ONE_SEED)


def test_interpolation_between_evaluations_is_remarked_on(pair: tuple[Run, Run], write_run: WriteRun) -> None:
    assert LINEAR_INTERPOLATION in compare_runs(pair).remarks
    twin = load_run(write_run("twin", losses={30: 5.5, 90: 4.5}))
    assert LINEAR_INTERPOLATION not in compare_runs([pair[0], twin]).remarks


def test_equal_losses_have_no_lower_run(write_run: WriteRun) -> None:
    runs = [load_run(write_run(name, losses={90: 4.5})) for name in ("first", "second")]
    verdict = judge_curves(runs[0], runs[1], "tokens")
    assert verdict.lower is None
    assert verdict.text.endswith("second 4.5000, first 4.5000; no difference.")


def test_baseline_is_lower_than_a_worse_candidate(write_run: WriteRun) -> None:
    base, other = (load_run(write_run(name, losses={90: loss})) for name, loss in (("a", 4.5), ("b", 4.75)))
    assert judge_curves(base, other, "tokens").lower == "a"


def test_single_evaluation_gives_no_verdict_at_a_different_budget(write_run: WriteRun) -> None:
    base = load_run(write_run("mha", losses={90: 4.625}))
    slow = load_run(write_run("slow", losses={90: 4.375}, step_seconds=0.8))
    assert judge_curves(base, slow, "tokens").difference == -0.25
    at_equal_time = judge_curves(base, slow, "seconds")
    assert at_equal_time.difference is None
    assert at_equal_time.text == (
        "At equal time (45 s of training): no comparison, since slow has no validation loss there; "
        "reduce evaluation.interval."
    )


def test_missing_results_stay_missing(write_run: WriteRun) -> None:
    base = load_run(write_run("mha", losses={30: 5.5, 90: None}))
    absent = dict.fromkeys(
        ("parameters", "training_flops_per_token", "training_seconds", "median_step_seconds")
    )
    bare = load_run(write_run("bare", losses={}, summary=absent))
    comparison = compare_runs([base, bare])
    row = comparison.rows[1]
    assert row.parameters is None
    assert row.parameters_ratio is None
    assert row.training_flops_per_token_ratio is None
    assert row.tokens_per_second is None
    assert row.final_validation_loss is None
    assert row.final_validation_loss_difference is None
    assert row.validation_perplexity is None
    assert {verdict.budget for verdict in comparison.verdicts} == {None}
    assert comparison.verdicts[0].text == "At equal tokens: no comparison, since bare has no validation loss."
    assert comparison.remarks[0] == (
        "The parameter counts of bare and mha are not both recorded, so that their sizes may differ."
    )


def test_curve_is_not_interpolated_across_a_missing_loss(write_run: WriteRun) -> None:
    run = load_run(write_run("mha", losses={30: 5.5, 60: None, 90: 4.625}))
    assert read_loss(run, "seconds", 30.0) is None
    assert read_loss(run, "seconds", 25.0) is None
    assert read_loss(run, "seconds", 44.0) is None
    assert read_loss(run, "seconds", 45.0) == Reading(4.625, (90, 90))


def test_causal_half_of_attention_is_compared_as_well(write_run: WriteRun) -> None:
    # Half of the FLOPs of a step are scores; with the causal half (52 of 102 pairs) a quarter is left out.
    terms = {"scores": 600.0, "mlp": 600.0}
    wide = write_run(
        "wide",
        losses={60: 4.5, 90: 4.375},
        flops_per_token=1200.0,
        summary={"training_flops_per_token": terms},
    )
    base = load_run(write_run("mha", losses={60: 4.75, 90: 4.625}))
    full, half = (judge_curves(base, load_run(wide), axis) for axis in ("flops", "causal_flops"))
    assert full.budget == 32130e3
    share = (600 * 26 / 51 + 600) / 1200
    assert half.budget == pytest.approx(32130 * 1200 * share)
    unknown = write_run("unknown", losses={90: 4.5}, summary={"training_flops_per_token": None})
    verdict = judge_curves(base, load_run(unknown), "causal_flops")
    assert verdict.statement == "no comparison, since the FLOPs of the runs are not recorded by term."


def test_different_sizes_and_machines_are_remarked_on(write_run: WriteRun) -> None:
    base = load_run(write_run("mha", losses={90: 4.5}))
    big = {"parameters": {"all": 100_094}}
    other = load_run(write_run("big", losses={90: 4.5}, summary=big, provenance={"machine": "bench-2"}))
    size, machines, _ = compare_runs([base, other]).remarks
    assert size.startswith(
        "big has 5.0 % more parameters than mha; differences of up to 1% count as matched."
    )
    assert machines.startswith("The runs were trained on different machines")


def test_runs_with_other_differences_are_refused(write_run: WriteRun) -> None:
    runs = [
        load_run(write_run(f"s{seed}", losses={90: 4.5}, config={"training__seed": seed})) for seed in (3, 5)
    ]
    with pytest.raises(UserError, match=r"training\.seed: s3 3, s5 5"):
        compare_runs(runs)


def build_curve(spent: list[int], losses: list[float]) -> SimpleNamespace:
    """Return a run with a validation curve alone."""
    points = tuple(
        ValidationPoint.model_validate(
            {
                "kind": "validation",
                "step": step,
                "consumed_tokens": tokens,
                "training_flops": 3.0 * tokens,
                "elapsed_seconds": 0.25 * tokens,
                "validation_loss": loss,
            }
        )
        for step, (tokens, loss) in enumerate(zip(spent, losses, strict=True), 1)
    )
    summary = SimpleNamespace(training_flops_per_token={"mlp": 3.0})
    config = SimpleNamespace(data=SimpleNamespace(sequence_length=51))
    run = SimpleNamespace(validation_curve=points, summary=summary, config=config)
    run.spent = lambda point, axis: Run.spent(run, point, axis)
    return run


@given(
    spent=st.lists(st.integers(1, 10**9), min_size=1, max_size=9, unique=True).map(sorted),
    losses=st.lists(st.floats(0.5, 12.0), min_size=9, max_size=9),
    share=st.floats(-0.5, 1.5),
    axis=st.sampled_from(CURVE_AXES),
)
def test_interpolation_stays_between_its_neighbours_and_never_extrapolates(
    spent: list[int], losses: list[float], share: float, axis: Axis
) -> None:
    run: Any = build_curve(spent, losses[: len(spent)])
    curve = run.validation_curve
    first, last = run.spent(curve[0], axis), run.spent(curve[-1], axis)
    budget = first + share * (last - first) if len(curve) > 1 else first + share
    reading = read_loss(run, axis, budget)
    if not first <= budget <= last:
        assert reading is None
        return
    assert reading is not None
    neighbours = [point for point in curve if point.step in reading.steps]
    low, high = min(p.loss for p in neighbours), max(p.loss for p in neighbours)
    assert low - 1e-9 <= reading.loss <= high + 1e-9
    assert run.spent(neighbours[0], axis) <= budget <= run.spent(neighbours[-1], axis)


def test_shared_budget_is_the_end_of_the_shorter_curve(pair: tuple[Run, Run]) -> None:
    for axis, order in itertools.product(CURVE_AXES, (pair, pair[::-1])):
        ends = [run.spent(run.validation_curve[-1], axis) for run in pair]
        assert find_shared_budget(*order, axis) == min(ends)
