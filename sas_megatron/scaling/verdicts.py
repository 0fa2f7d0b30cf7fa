"""Verdicts on a candidate against the baseline at equal parameters, tokens, FLOPs or time.

A run of the candidate is compared with the baseline's runs of the same seed at the same position on the axis:
with the baseline's own run if that spent the same amount (within 1 %), otherwise with a curve through runs
that spent more and less, each trained to the end of its own schedule. For FLOPs, tokens and time the curve
joins the budgets of one size; for parameters it joins the sizes trained on equal tokens. Losses are never
extrapolated beyond the measured runs.

With several candidates on one axis, a chance difference becomes more likely. `judge_variants` corrects the
p-values for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sas_megatron.scaling.laws.points import SAME_LEVEL
from sas_megatron.scaling.numbers import (
    format_difference,
    format_duration,
    format_exact,
    format_interval,
    format_loss,
    format_power,
)
from sas_megatron.scaling.outcomes import AXIS_NAMES, Axis, Outcome, choose_variant, count_diverged
from sas_megatron.scaling.seed_noise import (
    LEVEL,
    MAX_SEEDS,
    CellDifference,
    LossesByBudget,
    MeanDifference,
    adjust_p_values,
    average_difference,
    estimate_noise,
)

Result = Literal["wins", "loses", "inconclusive"]


@dataclass(frozen=True)
class Reading:
    """A loss read from a validation curve, and the steps of the two evaluations that enclose it."""

    loss: float
    steps: tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """A candidate against the baseline on one axis.

    Attributes:
        mean: The difference of the losses (candidate minus baseline); None if no runs could be compared.
        cells: The differences by size and budget that `mean` averages.
        num_unmatched: Runs of the candidate that are not enclosed by measured runs of the baseline.
        p_value: Probability of such a difference between equal variants, adjusted for `num_comparisons`
            tests on the axis; None without an estimate of the noise.
        reservations: Sentences that limit the result.
        statement: The result and the reservations in words, without the axis.
        budget: For losses read from validation curves during training: the amount spent at the reading.
        readings: For such losses: the readings of the baseline and of the candidate.
    """

    axis: Axis
    baseline: str
    candidate: str
    result: Result
    mean: MeanDifference | None
    cells: tuple[CellDifference, ...]
    num_unmatched: int = 0
    p_value: float | None = None
    num_comparisons: int = 1
    reservations: tuple[str, ...] = ()
    statement: str = ""
    budget: float | None = None
    readings: tuple[Reading | None, Reading | None] = (None, None)

    @property
    def text(self) -> str:
        """The axis, the budget of readings during training, and the statement."""
        budget = "" if self.budget is None else f" ({_format_budget(self.axis, self.budget)})"
        return f"At equal {AXIS_NAMES[self.axis]}{budget}: {self.statement}"

    @property
    def difference(self) -> float | None:
        """The mean loss of the candidate minus that of the baseline."""
        return None if self.mean is None else self.mean.difference

    @property
    def lower(self) -> str | None:
        """The variant with the lower mean loss; None if they are equal at four decimals or not compared."""
        if self.difference is None or format_loss(abs(self.difference)) == format_loss(0.0):
            return None
        return self.candidate if self.difference < 0 else self.baseline


def phrase_verdict(axes: Sequence[Axis], statement: str) -> str:
    """Return a statement that holds on each of the axes as a sentence."""
    return f"At equal {', at equal '.join(AXIS_NAMES[axis] for axis in axes)}: {statement}"


def judge_variants(
    outcomes: Sequence[Outcome], *, baseline: str, candidates: Sequence[str], axis: Axis
) -> tuple[Verdict, ...]:
    """Compare several candidates with the baseline on one axis.

    The p-values are adjusted by Holm's method: with a probability of 95 % no candidate wins or loses by
    chance.

    Raises:
        FieldError: One of the variants has no run with a loss.
    """
    count = max(1, len(candidates))
    separate = [
        judge_variant(outcomes, baseline=baseline, candidate=candidate, axis=axis, num_comparisons=count)
        for candidate in candidates
    ]
    tested = [verdict.p_value for verdict in separate if verdict.p_value is not None]
    adjusted = iter(adjust_p_values(tested))
    return tuple(
        verdict
        if verdict.p_value is None
        else _conclude(dataclasses.replace(verdict, p_value=next(adjusted), num_comparisons=len(tested)))
        for verdict in separate
    )


def judge_variant(
    outcomes: Sequence[Outcome], *, baseline: str, candidate: str, axis: Axis, num_comparisons: int = 1
) -> Verdict:
    """Compare the finished runs of two variants on one axis, without a correction of the p-value.

    Args:
        outcomes: Runs of at least these two variants.
        baseline: Name of the variant to compare with.
        candidate: Name of the variant to judge.
        axis: Quantity that is equal in the comparison.
        num_comparisons: Planned comparisons on the axis; they increase the number of seeds needed.

    Raises:
        FieldError: One of the variants has no run with a loss.
    """
    base_runs, runs = choose_variant(outcomes, baseline), choose_variant(outcomes, candidate)
    cells, num_unmatched = _compare_cells(base_runs, runs, axis)
    noise = estimate_noise(cells, _list_repetitions(base_runs + runs))
    mean = average_difference(cells, noise, num_comparisons=num_comparisons) if cells else None
    reservations = _list_reservations(outcomes, (baseline, candidate), mean, num_unmatched)
    return _conclude(
        Verdict(
            axis=axis,
            baseline=baseline,
            candidate=candidate,
            result="inconclusive",
            mean=mean,
            cells=tuple(cells),
            num_unmatched=num_unmatched,
            p_value=None if mean is None else mean.p_value,
            reservations=tuple(reservations),
        )
    )


def _conclude(verdict: Verdict) -> Verdict:
    """Set the result and the statement that follow from the p-value."""
    result: Result = "inconclusive"
    if verdict.mean is not None and verdict.p_value is not None and verdict.p_value < 1 - LEVEL:
        result = "wins" if verdict.mean.difference < 0 else "loses"
    judged = dataclasses.replace(verdict, result=result)
    return dataclasses.replace(judged, statement=" ".join([_phrase(judged), *verdict.reservations]))


def interpolate_loss(spent: Sequence[float], losses: Sequence[float], amount: float) -> float | None:
    """Return the loss at `amount`, interpolated between runs; None if the amount is outside the runs.

    The interpolant is the parabola through three runs in logarithms, or the line through two. A line alone
    would lie above the convex curve and favour the variant that is not interpolated.
    """
    order = np.argsort(spent)
    x, y = np.log(np.asarray(spent, float)[order]), np.log(np.asarray(losses, float)[order])
    target = math.log(amount)
    nearest = np.argsort(np.abs(x - target), kind="stable")
    if abs(x[nearest[0]] - target) <= SAME_LEVEL:
        return float(np.exp(y[nearest[0]]))
    if not x[0] < target < x[-1]:
        return None
    above = int(np.searchsorted(x, target))
    # The two runs that enclose the amount, and the nearest of the others that spent a different amount.
    enclosing = [above - 1, above]
    others = [int(index) for index in nearest if np.abs(x[index] - x[enclosing]).min() > SAME_LEVEL]
    chosen = [*enclosing, *others[:1]]
    weights = [
        math.prod((target - x[other]) / (x[index] - x[other]) for other in chosen if other != index)
        for index in chosen
    ]
    return float(np.exp(np.dot(weights, y[chosen])))


def _compare_cells(
    base_runs: Sequence[Outcome], runs: Sequence[Outcome], axis: Axis
) -> tuple[list[CellDifference], int]:
    """Return the cells in which the candidate can be compared, and the number of runs that cannot."""
    cells, num_unmatched = [], 0
    for (size, budget), group in itertools.groupby(sorted(runs, key=_by_cell), key=lambda run: run.cell):
        matched = [(run, _read_baseline(base_runs, run, axis)) for run in group]
        num_unmatched += sum(not losses for _, losses in matched)
        pairs = {
            run.seed: run.known("loss") - losses[run.seed] for run, losses in matched if run.seed in losses
        }
        others = [(run, losses) for run, losses in matched if losses]
        if pairs:
            cells.append(CellDifference(size, budget, pairs))
        elif others:
            by_seed = {seed: loss for _, losses in others for seed, loss in losses.items()}
            candidate_losses = {run.seed: run.known("loss") for run, _ in others}
            cells.append(CellDifference(size, budget, {}, candidate_losses, by_seed))
    return cells, num_unmatched


def _read_baseline(base_runs: Sequence[Outcome], run: Outcome, axis: Axis) -> dict[int, float]:
    """Return the baseline's loss by seed at the amount that `run` spent; empty if it cannot be read."""
    if getattr(run, axis) is None:
        return {}
    on_curve = [
        base for base in base_runs if getattr(base, axis) is not None and _shares_curve(base, run, axis)
    ]
    losses = {}
    for seed in sorted({base.seed for base in on_curve}):
        curve = [base for base in on_curve if base.seed == seed]
        loss = interpolate_loss(
            [base.known(axis) for base in curve], [base.known("loss") for base in curve], run.known(axis)
        )
        if loss is not None:
            losses[seed] = loss
    return losses


def _shares_curve(base: Outcome, run: Outcome, axis: Axis) -> bool:
    """Return whether a run of the baseline is on the curve: equal tokens for parameters, else equal size."""
    if axis == "params":
        return abs(math.log(base.tokens / run.tokens)) <= SAME_LEVEL
    return base.size == run.size


def _by_cell(run: Outcome) -> tuple[str, str, int]:
    return (*run.cell, run.seed)


def _list_repetitions(runs: Sequence[Outcome]) -> list[LossesByBudget]:
    """Return for each variant and size its losses by budget and seed."""
    groups: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for run in runs:
        by_budget = groups.setdefault((run.variant, run.size), {})
        by_budget.setdefault(run.budget, {})[run.seed] = run.known("loss")
    return [list(by_budget.values()) for by_budget in groups.values()]


def _format_budget(axis: Axis, budget: float) -> str:
    if axis == "tokens":
        return f"{format_exact(budget)} tokens"
    return f"{format_power(budget)} FLOPs" if axis == "flops" else f"{format_duration(budget)} of training"


def _phrase(verdict: Verdict) -> str:
    baseline, candidate, mean = verdict.baseline, verdict.candidate, verdict.mean
    if mean is None:
        return f"no comparison with {baseline}, since its runs do not enclose the runs of {candidate}."
    side = "lower" if mean.difference < 0 else "higher"
    size = f"the loss of {candidate} is {side} by {format_loss(abs(mean.difference))}"
    count = len(verdict.cells)
    scope = f"{count} {'size and budget' if count == 1 else 'sizes and budgets'}"
    if mean.interval is None:
        return (
            f"inconclusive: {size} in {scope}, but the variation between seeds is unknown; train at least "
            "two seeds of one size."
        )
    measured = f"{size} (95 % interval {format_interval(mean.interval, format_difference)}, {scope})"
    if verdict.result != "inconclusive":
        return f"{candidate} {verdict.result}: {measured}."
    if mean.p_value is not None and mean.p_value < 1 - LEVEL:
        measured += (
            f", significant as a single test, but not as one of {verdict.num_comparisons} comparisons (p = "
            f"{verdict.p_value:.2g} by Holm's method)"
        )
    needed = mean.seeds_needed
    seeds = f"{needed} seeds of each" if needed is not None else f"more than {MAX_SEEDS:,} seeds of each"
    return (
        f"inconclusive: {measured}; detecting a difference of this size with a power of 80 % would take "
        f"{seeds}."
    )


def _list_reservations(
    outcomes: Sequence[Outcome], variants: Sequence[str], mean: MeanDifference | None, num_unmatched: int
) -> list[str]:
    texts = []
    if mean is not None and mean.noise is not None and mean.noise.assumed:
        texts.append(
            "No size and budget has two seeds of both variants: the noise is estimated from repeated seeds "
            "within one variant and assumed to be independent between the two."
        )
    if mean is not None and num_unmatched:
        texts.append(
            f"Not included: {_count(num_unmatched)} of {variants[1]} that no runs of {variants[0]} enclose."
        )
    for variant in variants:
        if diverged := count_diverged(outcomes, variant):
            texts.append(f"Not included: {_count(diverged)} of {variant} without a loss.")
    return texts


def _count(runs: int) -> str:
    return f"{runs} run{'' if runs == 1 else 's'}"
