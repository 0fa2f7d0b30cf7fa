"""Verdicts on two single runs, read from their validation curves at the largest budget that both reached.

Losses between two evaluations are interpolated linearly. Losses are never extrapolated beyond a curve.
"""

from __future__ import annotations

import dataclasses
import itertools

from sas_megatron.scaling.numbers import format_loss
from sas_megatron.scaling.outcomes import Axis
from sas_megatron.scaling.runs import Run
from sas_megatron.scaling.significance import Estimate
from sas_megatron.scaling.verdicts import Reading, Verdict

CURVE_AXES: tuple[Axis, ...] = ("tokens", "flops", "causal_flops", "seconds")


def judge_curves(baseline: Run, candidate: Run, axis: Axis) -> Verdict:
    """Compare the validation losses of two runs at the largest budget that both reached.

    The result is always inconclusive, since a single seed gives no estimate of the noise.

    Args:
        baseline: The run to compare with.
        candidate: The run to judge.
        axis: One of `CURVE_AXES`.
    """
    runs = (baseline, candidate)
    budget = find_shared_budget(baseline, candidate, axis)
    readings = [None if budget is None else read_loss(run, axis, budget) for run in runs]
    base, other = readings
    verdict = Verdict(
        axis=axis,
        baseline=baseline.name,
        candidate=candidate.name,
        result="inconclusive",
        estimate=None if base is None or other is None else Estimate(other.loss - base.loss),
        budget=budget,
        readings=(base, other),
    )
    return dataclasses.replace(verdict, statement=_phrase(verdict, runs))


def find_shared_budget(baseline: Run, candidate: Run, axis: Axis) -> float | None:
    """Return the largest amount up to which both runs were evaluated; None without any."""
    ends = [
        run.spent(run.validation_curve[-1], axis) if run.validation_curve else None
        for run in (baseline, candidate)
    ]
    known = [end for end in ends if end is not None]
    return min(known) if len(known) == len(ends) else None


def read_loss(run: Run, axis: Axis, budget: float) -> Reading | None:
    """Return the linearly interpolated loss at `budget`; None outside the curve or next to a missing loss."""
    points = [(run.spent(point, axis), point) for point in run.validation_curve]
    for spent, point in reversed(points):
        if spent == budget:
            return None if point.loss is None else Reading(point.loss, (point.step, point.step))
    for (start, before), (end, after) in itertools.pairwise(points):
        if start is not None and end is not None and start < budget < end:
            if before.loss is None or after.loss is None:
                return None
            share = (budget - start) / (end - start)
            return Reading(before.loss + share * (after.loss - before.loss), (before.step, after.step))
    return None


def _phrase(verdict: Verdict, runs: tuple[Run, Run]) -> str:
    if verdict.budget is None and all(run.validation_curve for run in runs):
        return "no comparison, since the FLOPs of the runs are not recorded by term."
    if verdict.budget is None:
        unevaluated = " and ".join(run.name for run in runs if not run.validation_curve)
        return f"no comparison, since {unevaluated} has no validation loss."
    base, other = verdict.readings
    if base is None or other is None:
        missing = " and ".join(
            run.name for run, reading in zip(runs, verdict.readings, strict=True) if reading is None
        )
        return f"no comparison, since {missing} has no validation loss there; reduce evaluation.interval."
    losses = f"{verdict.candidate} {format_loss(other.loss)}, {verdict.baseline} {format_loss(base.loss)}"
    result = "no difference"
    if verdict.lower is not None:
        result = f"{verdict.lower} is lower by {format_loss(abs(other.loss - base.loss))}"
    early = [_describe_early_reading(run, reading) for run, reading in zip(runs, (base, other), strict=True)]
    return " ".join([f"{losses}; {result}.", *filter(None, early)])


def _describe_early_reading(run: Run, reading: Reading) -> str:
    """State that a run is read before its end, where its learning rate schedule is not complete."""
    first, last = reading.steps
    if first == last == run.summary.steps:
        return ""
    where = f"at step {first}" if first == last else f"between its evaluations at steps {first} and {last}"
    text = f"{run.name} is read {where} of {run.summary.steps}"
    if run.config.schedule.kind == "constant":
        return f"{text}."
    return f"{text}, before the end of its learning rate decay, which increases its loss."
