"""Verdicts on two single runs, read from their validation curves at the largest budget that both reached.

Losses between two evaluations are interpolated linearly. Losses are never extrapolated beyond a curve.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from sas_megatron.scaling.numbers import format_loss
from sas_megatron.scaling.outcomes import Axis
from sas_megatron.scaling.runs import CurvePoint, Run
from sas_megatron.scaling.seed_noise import CellDifference, MeanDifference
from sas_megatron.scaling.verdicts import Reading, Verdict

CURVE_AXES: tuple[Axis, ...] = ("tokens", "flops", "seconds")


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
    readings = [None if budget is None else read_loss(run.validation_curve, axis, budget) for run in runs]
    base, other = readings
    mean: MeanDifference | None = None
    cells: tuple[CellDifference, ...] = ()
    if base is not None and other is not None:
        mean = MeanDifference(other.loss - base.loss, None, None, None, None)
        seed = candidate.config.training.seed
        cells = (CellDifference("", "", {seed: mean.difference}),)
    verdict = Verdict(
        axis=axis,
        baseline=baseline.name,
        candidate=candidate.name,
        result="inconclusive",
        mean=mean,
        cells=cells,
        num_unmatched=int(mean is None),
        budget=budget,
        readings=(base, other),
    )
    return dataclasses.replace(verdict, statement=_phrase(verdict, runs))


def find_shared_budget(baseline: Run, candidate: Run, axis: Axis) -> float | None:
    """Return the largest tokens, FLOPs or seconds up to which both runs were evaluated; None without any."""
    curves = (baseline.validation_curve, candidate.validation_curve)
    return min(curve[-1].spent(axis) for curve in curves) if all(curves) else None


def read_loss(curve: Sequence[CurvePoint], axis: Axis, budget: float) -> Reading | None:
    """Return the linearly interpolated loss at `budget`; None outside the curve or next to a missing loss."""
    for point in reversed(curve):
        if point.spent(axis) == budget:
            return None if point.loss is None else Reading(point.loss, (point.step, point.step))
    for before, after in itertools.pairwise(curve):
        start, end = before.spent(axis), after.spent(axis)
        if start < budget < end:
            if before.loss is None or after.loss is None:
                return None
            share = (budget - start) / (end - start)
            return Reading(before.loss + share * (after.loss - before.loss), (before.step, after.step))
    return None


def _phrase(verdict: Verdict, runs: tuple[Run, Run]) -> str:
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
