"""Convergence saving: the share of steps by which a run reaches another's final loss earlier.

The SAS paper (arXiv 2507.07694) makes a claim of this kind: the baseline's loss in 40 % fewer steps. It is
meaningful only if both runs have the same schedule at every step; for other pairs there is a reason instead
of a number. A remark states different peak learning rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sas_megatron.scaling.laws.points import SAME_LEVEL
from sas_megatron.scaling.numbers import format_loss
from sas_megatron.scaling.outcomes import LossCurve
from sas_megatron.scaling.significance import Estimate

CONSTANT = "constant"
FALLING = (
    "The candidate is read before the end of its learning rate decay, the reference at its end, which "
    "understates the saving."
)


@dataclass(frozen=True)
class ConvergenceSaving:
    """A pair of runs; `saving` is the share of the reference's steps that is not needed, or None.

    `loss` is the final loss of the reference.
    """

    seed: int
    loss: float | None
    reference_steps: int
    steps: float | None
    saving: float | None
    reason: str | None


@dataclass(frozen=True)
class MeanSaving:
    """The mean over the seeds of one size and budget; the interval is None with fewer than two savings.

    `reason` states why there is no saving. `is_comparable` is True if the loss was merely not reached.
    """

    reference: str
    candidate: str
    size: str
    budget: str
    saving: float | None
    interval: tuple[float, float] | None
    pairs: tuple[ConvergenceSaving, ...]
    reason: str | None
    remarks: tuple[str, ...]

    @property
    def is_comparable(self) -> bool:
        """Whether the schedules of all pairs of runs are comparable."""
        return all(pair.loss is not None for pair in self.pairs)


def find_savings(curves: Sequence[LossCurve], *, reference: str, candidate: str) -> tuple[MeanSaving, ...]:
    """Return the savings of each size and budget, over the seeds that both variants have."""
    runs = {(curve.variant, curve.size, curve.budget, curve.seed): curve for curve in curves}
    cells = sorted({(curve.size, curve.budget) for curve in curves if curve.variant == candidate})
    found = []
    for cell in cells:
        seeds = sorted(
            curve.seed
            for curve in curves
            if curve.variant == candidate
            and (curve.size, curve.budget) == cell
            and (reference, *cell, curve.seed) in runs
        )
        pairs = tuple(
            find_saving(runs[(reference, *cell, seed)], runs[(candidate, *cell, seed)]) for seed in seeds
        )
        if pairs:
            first = runs[(reference, *cell, seeds[0])], runs[(candidate, *cell, seeds[0])]
            found.append(_average(reference, candidate, cell, pairs, remarks=_list_remarks(*first)))
    return tuple(found)


def find_saving(reference: LossCurve, candidate: LossCurve) -> ConvergenceSaving:
    """Return the step at which the candidate reaches the reference's final loss, by linear interpolation."""
    planned = reference.planned_steps
    if reason := _find_difference(reference, candidate):
        return ConvergenceSaving(candidate.seed, None, planned, None, None, reason)
    loss, last = reference.losses[-1], reference.steps[-1]
    steps = find_first_step(candidate, loss)
    if steps is None:
        reason = (
            f"{candidate.variant} does not reach {format_loss(loss)} in its {candidate.steps[-1]:,} steps"
        )
        return ConvergenceSaving(candidate.seed, loss, last, None, None, reason)
    return ConvergenceSaving(candidate.seed, loss, last, steps, 1 - steps / last, None)


def find_first_step(curve: LossCurve, loss: float) -> float | None:
    """Return the first step at which the curve is at most `loss`; None if there is no such step."""
    if curve.losses[0] <= loss:
        return float(curve.steps[0])
    points = zip(curve.steps, curve.losses, strict=True)
    for (step, before), (next_step, after) in itertools.pairwise(points):
        if after <= loss:
            return step + (next_step - step) * (before - loss) / (before - after)
    return None


def _find_difference(reference: LossCurve, candidate: LossCurve) -> str | None:
    names = f"{candidate.variant} and {reference.variant}"
    for curve in (reference, candidate):
        if not curve.losses or not np.isfinite(curve.losses).all():
            return f"{curve.variant} has missing losses or no evaluations"
    if reference.steps[-1] < reference.planned_steps:
        reached = f"{reference.steps[-1]:,} of {reference.planned_steps:,}"
        return f"{reference.variant} was evaluated up to step {reached}"
    if reference.schedule != candidate.schedule:
        return (
            f"{names} have different schedules ({candidate.schedule} and {reference.schedule}), so that "
            "their steps are not comparable"
        )
    if reference.planned_steps != candidate.planned_steps:
        return (
            f"the schedules of {names} have {candidate.planned_steps:,} and {reference.planned_steps:,} "
            "steps, so that their learning rates differ at the same step"
        )
    if abs(candidate.tokens_per_step / reference.tokens_per_step - 1) > SAME_LEVEL:
        tokens = f"{candidate.tokens_per_step:,.0f} and {reference.tokens_per_step:,.0f} tokens"
        return f"the steps of {names} have {tokens}"
    return None


def _list_remarks(reference: LossCurve, candidate: LossCurve) -> tuple[str, ...]:
    texts = [FALLING] if candidate.schedule != CONSTANT else []
    one, other = candidate.learning_rate, reference.learning_rate
    if one is not None and other is not None and abs(math.log(one / other)) > SAME_LEVEL:
        texts.append(
            f"The peak learning rate of {candidate.variant} is {one / other:.2g} times that of "
            f"{reference.variant}."
        )
    return tuple(texts)


def _average(
    reference: str,
    candidate: str,
    cell: tuple[str, str],
    pairs: tuple[ConvergenceSaving, ...],
    *,
    remarks: tuple[str, ...],
) -> MeanSaving:
    size, budget = cell
    savings = [pair.saving for pair in pairs if pair.saving is not None]
    if len(savings) < len(pairs):
        # The mean over the seeds that reach the loss would be biased.
        reason = "; ".join(sorted({pair.reason for pair in pairs if pair.reason is not None}))
        return MeanSaving(reference, candidate, size, budget, None, None, pairs, reason, remarks=())
    mean = float(np.mean(savings))
    interval = None
    if len(savings) > 1:
        error = float(np.std(savings, ddof=1)) / math.sqrt(len(savings))
        interval = Estimate.of(mean, error, len(savings) - 1).interval
    return MeanSaving(reference, candidate, size, budget, mean, interval, pairs, None, remarks)
