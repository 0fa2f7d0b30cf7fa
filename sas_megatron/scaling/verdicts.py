"""Who has the lower loss at equal parameters, tokens, FLOPs and time: wins, loses, or cannot be told.

A candidate's run is set against the baseline's of the same seed at the same amount on the axis: its own run
where that spent as much (1 %), otherwise a curve through its runs that spent more and less, each trained to
the end of its own schedule. For FLOPs, tokens and time the curve joins the budgets of one size, for
parameters the sizes trained on equal tokens. Nothing is read beyond the measured runs.

Several candidates on one axis are as many chances of a chance difference: `judge_together` asks more of each.
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
from sas_megatron.scaling.numbers import format_difference, format_interval, format_loss
from sas_megatron.scaling.outcomes import AXIS_NAMES, Axis, Outcome, choose_variant, count_diverged
from sas_megatron.scaling.seed_noise import (
    LEVEL,
    MOST_SEEDS,
    Budgets,
    CellDifference,
    MeanDifference,
    adjust_p_values,
    average_difference,
    estimate_noise,
)

Result = Literal["wins", "loses", "cannot be told"]


@dataclass(frozen=True)
class AxisVerdict:
    """A candidate against the baseline on one axis; `mean` is None where no runs could be set side by side.

    `num_unread` runs of the candidate had no measured runs of the baseline on both sides of them. `p_value`
    is of no difference, as one of `comparisons` on the axis (`judge_together`); None without an interval.
    """

    axis: Axis
    baseline: str
    candidate: str
    result: Result
    mean: MeanDifference | None
    cells: tuple[CellDifference, ...]
    num_unread: int
    p_value: float | None
    comparisons: int
    reservations: tuple[str, ...]
    # The outcome and the reservations, without the axis.
    statement: str

    @property
    def text(self) -> str:
        """The outcome in sentences."""
        return phrase_verdict([self.axis], self.statement)


def phrase_verdict(axes: Sequence[Axis], statement: str) -> str:
    """One statement for all the axes that it is true of."""
    return f"At equal {', at equal '.join(AXIS_NAMES[axis] for axis in axes)}: {statement}"


def judge_together(
    outcomes: Sequence[Outcome], *, baseline: str, candidates: Sequence[str], axis: Axis
) -> tuple[AxisVerdict, ...]:
    """The verdicts of several candidates, of which with 95 % none wins or loses by chance.

    Raises:
        FieldError: one of the variants has no run with a loss.
    """
    alone = [
        judge_axis(
            outcomes, baseline=baseline, candidate=candidate, axis=axis, comparisons=max(1, len(candidates))
        )
        for candidate in candidates
    ]
    told = [verdict.p_value for verdict in alone if verdict.p_value is not None]
    adjusted = iter(adjust_p_values(told))
    return tuple(
        verdict
        if verdict.p_value is None
        else _conclude(dataclasses.replace(verdict, p_value=next(adjusted), comparisons=len(told)))
        for verdict in alone
    )


def judge_axis(
    outcomes: Sequence[Outcome], *, baseline: str, candidate: str, axis: Axis, comparisons: int = 1
) -> AxisVerdict:
    """Compares two variants' finished runs on one axis.

    `comparisons` is how many there will be on it, for the seeds that would tell; the verdict is on this one
    alone.

    Raises:
        FieldError: one of the variants has no run with a loss.
    """
    base_runs, runs = choose_variant(outcomes, baseline), choose_variant(outcomes, candidate)
    cells, num_unread = _set_side_by_side(base_runs, runs, axis)
    noise = estimate_noise(cells, _list_repeats(base_runs + runs))
    mean = average_difference(cells, noise, comparisons=comparisons) if cells else None
    reservations = _list_reservations(outcomes, (baseline, candidate), mean, num_unread)
    return _conclude(
        AxisVerdict(
            axis=axis,
            baseline=baseline,
            candidate=candidate,
            result="cannot be told",
            mean=mean,
            cells=tuple(cells),
            num_unread=num_unread,
            p_value=None if mean is None else mean.p_value,
            comparisons=1,
            reservations=tuple(reservations),
            statement="",
        )
    )


def _conclude(verdict: AxisVerdict) -> AxisVerdict:
    """The result and the statement that follow from the p-value."""
    result: Result = "cannot be told"
    if verdict.mean is not None and verdict.p_value is not None and verdict.p_value < 1 - LEVEL:
        result = "wins" if verdict.mean.difference < 0 else "loses"
    told = dataclasses.replace(verdict, result=result)
    return dataclasses.replace(told, statement=" ".join([_phrase(told), *verdict.reservations]))


def read_between(spent: Sequence[float], losses: Sequence[float], amount: float) -> float | None:
    """The loss at `amount`, on the parabola in logarithms through three runs (through two, the line).

    A line would lie above the bent curve and favour whoever is not read off it. None: the amount lies beyond
    the runs.
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
    # The two on either side, and the nearest of the others that spent another amount.
    sides = [above - 1, above]
    others = [int(index) for index in nearest if np.abs(x[index] - x[sides]).min() > SAME_LEVEL]
    chosen = [*sides, *others[:1]]
    weights = [
        math.prod((target - x[other]) / (x[index] - x[other]) for other in chosen if other != index)
        for index in chosen
    ]
    return float(np.exp(np.dot(weights, y[chosen])))


def _set_side_by_side(
    base_runs: Sequence[Outcome], runs: Sequence[Outcome], axis: Axis
) -> tuple[list[CellDifference], int]:
    """The cells in which the candidate can be compared, and how many of its runs cannot."""
    cells, num_unread = [], 0
    for (size, budget), group in itertools.groupby(sorted(runs, key=_by_cell), key=lambda run: run.cell):
        read = [(run, _read_baseline(base_runs, run, axis)) for run in group]
        num_unread += sum(not losses for _, losses in read)
        pairs = {run.seed: run.known("loss") - losses[run.seed] for run, losses in read if run.seed in losses}
        others = [(run, losses) for run, losses in read if losses]
        if pairs:
            cells.append(CellDifference(size, budget, pairs))
        elif others:
            by_seed = {seed: loss for _, losses in others for seed, loss in losses.items()}
            candidate_losses = {run.seed: run.known("loss") for run, _ in others}
            cells.append(CellDifference(size, budget, {}, candidate_losses, by_seed))
    return cells, num_unread


def _read_baseline(base_runs: Sequence[Outcome], run: Outcome, axis: Axis) -> dict[int, float]:
    """The baseline's loss by seed, at what the run spent; empty where it cannot be read."""
    if getattr(run, axis) is None:
        return {}
    along = [base for base in base_runs if getattr(base, axis) is not None and _shares_curve(base, run, axis)]
    losses = {}
    for seed in sorted({base.seed for base in along}):
        curve = [base for base in along if base.seed == seed]
        loss = read_between(
            [base.known(axis) for base in curve], [base.known("loss") for base in curve], run.known(axis)
        )
        if loss is not None:
            losses[seed] = loss
    return losses


def _shares_curve(base: Outcome, run: Outcome, axis: Axis) -> bool:
    """Whether a run of the baseline belongs to the curve that is read: equal tokens, or one size."""
    if axis == "params":
        return abs(math.log(base.tokens / run.tokens)) <= SAME_LEVEL
    return base.size == run.size


def _by_cell(run: Outcome) -> tuple[str, str, int]:
    return (*run.cell, run.seed)


def _list_repeats(runs: Sequence[Outcome]) -> list[Budgets]:
    """Of each variant and size, losses by budget and seed."""
    groups: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for run in runs:
        by_budget = groups.setdefault((run.variant, run.size), {})
        by_budget.setdefault(run.budget, {})[run.seed] = run.known("loss")
    return [list(by_budget.values()) for by_budget in groups.values()]


def _phrase(verdict: AxisVerdict) -> str:
    baseline, candidate, mean = verdict.baseline, verdict.candidate, verdict.mean
    if mean is None:
        return f"no comparison of {candidate} and {baseline}, since no runs of {baseline} lie around its own."
    side = "lower" if mean.difference < 0 else "higher"
    size = f"{candidate}'s loss is {side} by {format_loss(abs(mean.difference))}"
    count = len(verdict.cells)
    places = f"{count} {'size and budget' if count == 1 else 'sizes and budgets'}"
    if mean.interval is None:
        return (
            f"it cannot be told from noise whether {candidate} wins: {size} in {places}, and nothing says "
            "how much another seed would change; train two seeds of a size at least."
        )
    measured = f"{size} (95 % of {format_interval(mean.interval, format_difference)}, {places})"
    if verdict.result != "cannot be told":
        return f"{candidate} {verdict.result}: {measured}."
    if mean.p_value is not None and mean.p_value < 1 - LEVEL:
        measured += (
            f", which alone would tell, but is one of {verdict.comparisons} comparisons (p = "
            f"{verdict.p_value:.2g} by Holm's method)"
        )
    needed = mean.seeds_that_would_tell
    seeds = f"{needed} seeds of each" if needed is not None else f"more than {MOST_SEEDS:,} seeds of each"
    return (
        f"it cannot be told from noise whether {candidate} wins: {measured}; to tell a difference of that "
        f"size in four studies of five would take {seeds}."
    )


def _list_reservations(
    outcomes: Sequence[Outcome], variants: Sequence[str], mean: MeanDifference | None, num_unread: int
) -> list[str]:
    texts = []
    if mean is not None and mean.noise is not None and mean.noise.assumed:
        texts.append(
            "The noise is assumed to be that of the seeds that one variant repeats, and independent between "
            "the two, since no size and budget has two seeds of both."
        )
    if mean is not None and num_unread:
        texts.append(
            f"Left out are {_count(num_unread)} of {variants[1]} that no runs of {variants[0]} lie around."
        )
    for variant in variants:
        if diverged := count_diverged(outcomes, variant):
            texts.append(f"Not in this are {_count(diverged)} of {variant} without a loss.")
    return texts


def _count(runs: int) -> str:
    return f"{runs} run{'' if runs == 1 else 's'}"
