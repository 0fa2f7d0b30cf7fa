"""Finished runs side by side: one row a run, and who is lower at equal tokens, FLOPs and time.

Losses between two evaluations are read off a straight line; nothing is ever read beyond a curve's ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sas_megatron.scaling.matching import TOLERANCE
from sas_megatron.scaling.numbers import (
    format_duration,
    format_exact,
    format_loss,
    format_power,
    format_share,
)
from sas_megatron.scaling.runs import CurvePoint, Run, check_comparable

Axis = Literal["consumed_tokens", "training_flops", "elapsed_seconds"]
AXES: tuple[Axis, ...] = ("consumed_tokens", "training_flops", "elapsed_seconds")

ONE_SEED = (
    "Each variant was trained with one seed. Another seed would shift every loss a little, by an amount "
    "that these runs cannot tell: a small difference may be noise. Repeat with more seeds before relying "
    "on it."
)
STRAIGHT_LINES = (
    "Between two evaluations a loss is read off the straight line that joins them. Loss curves bend below "
    "such a line, so the run that is read between evaluations looks worse than it was, the more so the "
    "further apart they are (evaluation.interval)."
)


@dataclass(frozen=True)
class ComparisonRow:
    """One run in numbers; ratios and differences are against the baseline, None where either is missing."""

    name: str
    attention: str
    ffn_hidden_size: int
    parameters: int | None
    parameters_ratio: float | None
    training_flops_per_token: float | None
    training_flops_per_token_ratio: float | None
    median_step_seconds: float | None
    median_step_seconds_ratio: float | None
    tokens_per_second: float | None
    training_seconds: float | None
    peak_memory_bytes: int | None
    final_validation_loss: float | None
    final_validation_loss_difference: float | None
    validation_perplexity: float | None
    validation_bits_per_byte: float | None


@dataclass(frozen=True)
class Reading:
    """A loss on a validation curve, and the steps of the evaluations it lies between."""

    loss: float
    steps: tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """A candidate against the baseline at the largest budget both reached on one axis.

    `difference` is the candidate's loss less the baseline's; `lower` names the better run, None for
    a tie at four decimals or where a loss is missing.
    """

    axis: Axis
    baseline: str
    candidate: str
    budget: float | None
    baseline_reading: Reading | None
    candidate_reading: Reading | None
    difference: float | None
    lower: str | None
    text: str


@dataclass(frozen=True)
class Comparison:
    """Rows in the order of the runs, verdicts by axis, and what the reader must know beside them."""

    rows: tuple[ComparisonRow, ...]
    verdicts: tuple[Verdict, ...]
    remarks: tuple[str, ...]


def compare_runs(runs: Sequence[Run]) -> Comparison:
    """Compares two or more runs; the first is the baseline.

    Raises:
        UserError: the runs differ in more than what a comparison may vary.
    """
    check_comparable(runs)
    rows = tuple(build_row(run, runs[0]) for run in runs)
    verdicts = tuple(judge(axis, runs[0], candidate) for axis in AXES for candidate in runs[1:])
    return Comparison(rows=rows, verdicts=verdicts, remarks=_list_remarks(runs, rows, verdicts))


def build_row(run: Run, baseline: Run) -> ComparisonRow:
    """The run's numbers; tokens per second are the mean over all of its training time."""
    summary, base = run.summary, baseline.summary
    parameters, flops = sum_terms(summary.parameters), sum_terms(summary.training_flops_per_token)
    loss, base_loss = summary.final_validation_loss, base.final_validation_loss
    return ComparisonRow(
        name=run.name,
        attention=run.config.attention.kind,
        ffn_hidden_size=run.config.model.ffn_hidden_size,
        parameters=None if parameters is None else int(parameters),
        parameters_ratio=_ratio(parameters, sum_terms(base.parameters)),
        training_flops_per_token=flops,
        training_flops_per_token_ratio=_ratio(flops, sum_terms(base.training_flops_per_token)),
        median_step_seconds=summary.median_step_seconds,
        median_step_seconds_ratio=_ratio(summary.median_step_seconds, base.median_step_seconds),
        tokens_per_second=_ratio(summary.tokens, summary.training_seconds),
        training_seconds=summary.training_seconds,
        peak_memory_bytes=summary.peak_memory_bytes,
        final_validation_loss=loss,
        final_validation_loss_difference=None if loss is None or base_loss is None else loss - base_loss,
        validation_perplexity=summary.validation_perplexity,
        validation_bits_per_byte=summary.validation_bits_per_byte,
    )


def find_shared_budget(baseline: Run, candidate: Run, axis: Axis) -> float | None:
    """The largest tokens, FLOPs or seconds at which both runs were still being evaluated."""
    curves = (baseline.validation_curve, candidate.validation_curve)
    return min(_spent(curve[-1], axis) for curve in curves) if all(curves) else None


def read_loss(curve: Sequence[CurvePoint], axis: Axis, budget: float) -> Reading | None:
    """The loss at `budget`, on the line between its neighbours; None outside the curve or in a gap of it."""
    for point in reversed(curve):
        if _spent(point, axis) == budget:
            return None if point.loss is None else Reading(point.loss, (point.step, point.step))
    for before, after in itertools.pairwise(curve):
        start, end = _spent(before, axis), _spent(after, axis)
        if start < budget < end:
            if before.loss is None or after.loss is None:
                return None
            share = (budget - start) / (end - start)
            return Reading(before.loss + share * (after.loss - before.loss), (before.step, after.step))
    return None


def judge(axis: Axis, baseline: Run, candidate: Run) -> Verdict:
    """Who has the lower validation loss at the largest budget that both reached, in numbers and in words."""
    budget = find_shared_budget(baseline, candidate, axis)
    readings = [
        None if budget is None else read_loss(run.validation_curve, axis, budget)
        for run in (baseline, candidate)
    ]
    base, other = readings
    difference = None if base is None or other is None else other.loss - base.loss
    lower = None
    if difference is not None and format_loss(abs(difference)) != format_loss(0.0):
        lower = candidate.name if difference < 0 else baseline.name
    return Verdict(
        axis=axis,
        baseline=baseline.name,
        candidate=candidate.name,
        budget=budget,
        baseline_reading=base,
        candidate_reading=other,
        difference=difference,
        lower=lower,
        text=_phrase(axis, budget, (baseline, candidate), (base, other), lower),
    )


def describe_budget(axis: Axis, budget: float) -> str:
    """The budget with its unit."""
    if axis == "consumed_tokens":
        return f"{format_exact(budget)} tokens"
    return (
        f"{format_power(budget)} FLOPs"
        if axis == "training_flops"
        else f"{format_duration(budget)} of training"
    )


def sum_terms(terms: Mapping[str, float] | None) -> float | None:
    """The total of named terms; None where there are none."""
    return sum(terms.values()) if terms else None


def _phrase(
    axis: Axis,
    budget: float | None,
    runs: tuple[Run, Run],
    readings: tuple[Reading | None, Reading | None],
    lower: str | None,
) -> str:
    name = {"consumed_tokens": "tokens", "training_flops": "FLOPs", "elapsed_seconds": "time"}[axis]
    if budget is None:
        unevaluated = " and ".join(run.name for run in runs if not run.validation_curve)
        return f"At equal {name}: no comparison, since {unevaluated} has no validation loss."
    start = f"At equal {name} ({describe_budget(axis, budget)}): "
    missing = [run.name for run, reading in zip(runs, readings, strict=True) if reading is None]
    base, other = readings
    if base is None or other is None:
        return start + (
            f"no comparison, since {' and '.join(missing)} has no validation loss there; "
            "evaluate more often (evaluation.interval)."
        )
    losses = f"{runs[1].name} {format_loss(other.loss)}, {runs[0].name} {format_loss(base.loss)}"
    result = f"{lower} is lower by {format_loss(abs(other.loss - base.loss))}" if lower else "no difference"
    early = [_say_early(run, reading) for run, reading in zip(runs, (base, other), strict=True)]
    return " ".join([f"{start}{losses}; {result}.", *filter(None, early)])


def _say_early(run: Run, reading: Reading) -> str:
    """That a run is read before its end: its schedule was made for more steps than are compared."""
    first, last = reading.steps
    if first == last == run.summary.steps:
        return ""
    where = f"at step {first}" if first == last else f"between its evaluations at steps {first} and {last}"
    text = f"{run.name} is read {where} of {run.summary.steps}"
    if run.config.schedule.kind == "constant":
        return f"{text}."
    return f"{text}, before its learning rate had finished falling, which counts against it."


def _list_remarks(
    runs: Sequence[Run], rows: Sequence[ComparisonRow], verdicts: Sequence[Verdict]
) -> tuple[str, ...]:
    remarks = [remark for run in runs for remark in run.remarks]
    for row in rows[1:]:
        ratio = row.parameters_ratio
        if ratio is None:
            remarks.append(f"Whether {row.name} is as large as {rows[0].name} is not recorded.")
        elif abs(ratio - 1) > TOLERANCE:
            comparative = "more" if ratio > 1 else "fewer"
            remarks.append(
                f"{row.name} has {format_share(abs(ratio - 1))} {comparative} parameters "
                f"than {rows[0].name}, where up to {TOLERANCE:.0%} counts as matched: part of a difference "
                "may be size."
            )
    machines = [run.provenance.get("machine") for run in runs]
    if any(machine != machines[0] for machine in machines):
        remarks.append(
            "The runs name different machines: their seconds, and the verdicts at equal time, do not compare."
        )
    readings = [
        reading for verdict in verdicts for reading in (verdict.baseline_reading, verdict.candidate_reading)
    ]
    if any(reading and reading.steps[0] != reading.steps[1] for reading in readings):
        remarks.append(STRAIGHT_LINES)
    return (*remarks, ONE_SEED)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _spent(point: CurvePoint, axis: Axis) -> float:
    value: float = getattr(point, axis)
    return value
