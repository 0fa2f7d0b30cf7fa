"""Verdicts on candidates against the baseline at equal parameters, tokens, FLOPs or time.

matched cells -> weights by the noise of each budget -> mean difference -> error from the seeds (`seed_noise`)
              -> p-value, adjusted for the number of candidates -> wins, loses or inconclusive

At equal FLOPs and time, the best size of the candidate is compared with the best size of the baseline where
the trained sizes enclose both; otherwise each size is compared with the same size of the baseline.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sas_megatron.scaling.matched_cells import CellDifference, VariantCells, match_best_sizes, match_sizes
from sas_megatron.scaling.numbers import (
    format_degrees,
    format_difference,
    format_duration,
    format_exact,
    format_interval,
    format_loss,
    format_p_value,
    format_power,
)
from sas_megatron.scaling.outcomes import (
    AXIS_NAMES,
    SPENDING,
    Axis,
    Outcome,
    choose_variant,
    count_diverged,
)
from sas_megatron.scaling.seed_noise import NoiseModel
from sas_megatron.scaling.significance import (
    LEVEL,
    MAX_SEEDS,
    Estimate,
    Part,
    adjust_p_values,
    count_seeds_needed,
)

Result = Literal["wins", "loses", "inconclusive"]
UNKNOWN_TIME_ERROR = "The errors of the step times were not recorded, so that the interval omits them."


@dataclass(frozen=True)
class Reading:
    """A loss read from a validation curve, and the steps of the two evaluations that enclose it."""

    loss: float
    steps: tuple[int, int]


@dataclass(frozen=True)
class BudgetDifference:
    """The mean difference over the cells of one budget, and its share in the mean over all budgets."""

    budget: str
    share: float
    estimate: Estimate


@dataclass(frozen=True)
class Verdict:
    """A candidate against the baseline on one axis.

    Attributes:
        estimate: The difference of the losses (candidate minus baseline); None if no runs could be compared.
        cells: The differences that `estimate` averages.
        by_budget: The mean differences by budget.
        same_size: For a comparison of best sizes: the mean difference at the same size.
        num_unmatched: Cells of the candidate that are not enclosed by measured cells of the baseline.
        p_value: The p-value of the estimate, adjusted for `num_comparisons` tests on the axis.
        reservations: Sentences that limit the result.
        statement: The result in words, without the axis and the reservations.
        budget: For losses read from validation curves during training: the amount spent at the reading.
        readings: For such losses: the readings of the baseline and of the candidate.
    """

    axis: Axis
    baseline: str
    candidate: str
    result: Result
    estimate: Estimate | None
    cells: tuple[CellDifference, ...] = ()
    by_budget: tuple[BudgetDifference, ...] = ()
    same_size: Estimate | None = None
    num_unmatched: int = 0
    p_value: float | None = None
    num_comparisons: int = 1
    seeds_needed: int | None = None
    reservations: tuple[str, ...] = ()
    statement: str = ""
    budget: float | None = None
    readings: tuple[Reading | None, Reading | None] = (None, None)

    @property
    def text(self) -> str:
        """The axis, the budget of readings during training, the statement and the reservations."""
        budget = "" if self.budget is None else f" ({_format_budget(self.axis, self.budget)})"
        return " ".join([f"At equal {AXIS_NAMES[self.axis]}{budget}: {self.statement}", *self.reservations])

    @property
    def difference(self) -> float | None:
        """The mean loss of the candidate minus that of the baseline."""
        return None if self.estimate is None else self.estimate.difference

    @property
    def lower(self) -> str | None:
        """The variant with the lower mean loss; None if they are equal at four decimals or not compared."""
        if self.difference is None or format_loss(abs(self.difference)) == format_loss(0.0):
            return None
        return self.candidate if self.difference < 0 else self.baseline


def judge_variants(
    outcomes: Sequence[Outcome],
    *,
    baseline: str,
    candidates: Sequence[str],
    axis: Axis,
    noise: NoiseModel | None = None,
) -> tuple[Verdict, ...]:
    """Compare several candidates with the baseline on one axis.

    The p-values are adjusted by Holm's method: with a probability of 95 % no candidate wins or loses by
    chance.

    Args:
        outcomes: Runs of these variants; the noise is pooled over all variants, others included.
        baseline: Name of the variant to compare with.
        candidates: Names of the variants to judge.
        axis: Quantity that is equal in the comparison.
        noise: The noise of the runs; None to estimate it.

    Raises:
        FieldError: One of the variants has no run with a loss.
    """
    noise = noise or model_noise(outcomes)
    separate = [
        _judge(outcomes, noise, baseline=baseline, candidate=candidate, axis=axis) for candidate in candidates
    ]
    tested = [verdict.p_value for verdict in separate if verdict.p_value is not None]
    adjusted = iter(adjust_p_values(tested))
    return tuple(
        _conclude(
            verdict
            if verdict.p_value is None
            else dataclasses.replace(verdict, p_value=next(adjusted), num_comparisons=len(tested)),
            noise,
        )
        for verdict in separate
    )


def model_noise(outcomes: Sequence[Outcome]) -> NoiseModel:
    """Return the noise of the runs of all variants.

    Raises:
        FieldError: Two runs of a variant have the same size, budget and seed.
    """
    losses: dict[str, dict[tuple[str, str], dict[int, float]]] = {}
    for variant in dict.fromkeys(run.variant for run in outcomes if run.loss is not None):
        by_cell = losses.setdefault(variant, {})
        for run in choose_variant(outcomes, variant):
            by_cell.setdefault(run.cell, {})[run.seed] = run.known("loss")
    return NoiseModel.of(losses)


def estimate_mean(
    cells: Sequence[CellDifference],
    noise: NoiseModel,
    *,
    candidate: str,
    baseline: str,
    time_error: float = 0.0,
) -> Estimate:
    """Return the mean of differences, weighted by the noise of their budgets, with its error.

    Args:
        cells: At least one difference.
        noise: The noise of the runs.
        candidate: Name of the candidate.
        baseline: Name of the baseline.
        time_error: Relative standard error of the ratio of two step times, for differences at equal time. The
            errors of different sizes are independent, those of the budgets of a size equal.
    """
    shares = noise.weigh([cell.weights for cell in cells]).tolist()
    combined: tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]] = (Counter(), Counter())
    slopes: Counter[str | None] = Counter()
    for share, cell in zip(shares, cells, strict=True):
        slopes[cell.size] += share * cell.slope
        for total, weights in zip(combined, cell.weights, strict=True):
            for name, weight in weights.items():
                total[name] += share * weight
    variance = time_error**2 * sum(slope**2 for slope in slopes.values())
    others: list[Part] = [(variance, math.inf)] if variance else []
    difference = sum(share * cell.difference for share, cell in zip(shares, cells, strict=True))
    return noise.estimate(difference, candidate=candidate, baseline=baseline, weights=combined, others=others)


def _judge(
    outcomes: Sequence[Outcome], noise: NoiseModel, *, baseline: str, candidate: str, axis: Axis
) -> Verdict:
    """Compare two variants, without a correction of the p-value."""
    ours, theirs = (
        VariantCells.of(choose_variant(outcomes, variant), noise) for variant in (candidate, baseline)
    )
    cells, unmatched = match_sizes(ours, theirs, axis)
    reservations = []
    time_error = 0.0
    if axis == "seconds" and cells:
        if ours.seconds_error is None or theirs.seconds_error is None:
            reservations.append(UNKNOWN_TIME_ERROR)
        else:
            time_error = math.hypot(ours.seconds_error, theirs.seconds_error)

    def average(chosen: Sequence[CellDifference]) -> Estimate:
        return estimate_mean(chosen, noise, candidate=candidate, baseline=baseline, time_error=time_error)

    same_size = None
    if axis in SPENDING:
        best, at_edge = match_best_sizes(ours, theirs, axis)
        if best:
            same_size = average(cells) if cells else None
            cells, unmatched = best, []
        elif at_edge:
            reservations.append(_explain_edge(baseline, at_edge))
    if unmatched and cells:
        reservations.append(
            f"Not included: {_count(len(unmatched), 'cell')} of {candidate} that no runs of {baseline} "
            "enclose."
        )
    for variant in (baseline, candidate):
        if diverged := count_diverged(outcomes, variant):
            reservations.append(f"Not included: {_count(diverged, 'run')} of {variant} without a loss.")
    estimate = average(cells) if cells else None
    shares: dict[str, float] = {}
    for cell, share in zip(cells, noise.weigh([cell.weights for cell in cells]).tolist(), strict=True):
        shares[cell.budget] = shares.get(cell.budget, 0.0) + share
    return Verdict(
        axis=axis,
        baseline=baseline,
        candidate=candidate,
        result="inconclusive",
        estimate=estimate,
        cells=tuple(cells),
        by_budget=tuple(
            BudgetDifference(budget, share, average([cell for cell in cells if cell.budget == budget]))
            for budget, share in shares.items()
        ),
        same_size=same_size,
        num_unmatched=len(unmatched),
        p_value=None if estimate is None else estimate.p_value,
        reservations=tuple(reservations),
    )


def _conclude(verdict: Verdict, noise: NoiseModel) -> Verdict:
    """Set the result, the seeds needed and the statement that follow from the p-value."""
    estimate = verdict.estimate
    result: Result = "inconclusive"
    needed = None
    if estimate is None or verdict.p_value is None:
        pass
    elif verdict.p_value < 1 - LEVEL:
        result = "wins" if estimate.difference < 0 else "loses"
    else:
        needed = count_seeds_needed(
            estimate.difference,
            estimate.deviation or 0.0,
            max(2, noise.num_repeated),
            num_comparisons=verdict.num_comparisons,
        )
    judged = dataclasses.replace(verdict, result=result, seeds_needed=needed)
    return dataclasses.replace(judged, statement=_phrase(judged))


def _phrase(verdict: Verdict) -> str:
    baseline, candidate, estimate = verdict.baseline, verdict.candidate, verdict.estimate
    if estimate is None:
        return f"no comparison with {baseline}, since its runs do not enclose the runs of {candidate}."
    side = "lower" if estimate.difference < 0 else "higher"
    size = f"the loss of {candidate} is {side} by {format_loss(abs(estimate.difference))}"
    is_best = verdict.cells[0].size is None
    scope = (
        f"{_count(len(verdict.cells), 'budget')}, each at its best size"
        if is_best
        else (f"{len(verdict.cells)} {'size and budget' if len(verdict.cells) == 1 else 'sizes and budgets'}")
    )
    if estimate.interval is None or verdict.p_value is None:
        return (
            f"inconclusive: {size} in {scope}, but the variation between seeds is unknown; train at least "
            "two seeds of one size."
        )
    measured = (
        f"{size} (95 % interval {format_interval(estimate.interval, format_difference)}, "
        f"{format_p_value(verdict.p_value)}, {format_degrees(estimate.degrees)}, {scope})"
    )
    if verdict.same_size is not None:
        measured += f"; at the same size it differs by {format_difference(verdict.same_size.difference)}"
    if verdict.result != "inconclusive":
        return f"{candidate} {verdict.result}: {measured}."
    if estimate.p_value is not None and estimate.p_value < 1 - LEVEL:
        measured += (
            f", significant as a single test ({format_p_value(estimate.p_value)}), but not as one of "
            f"{verdict.num_comparisons} comparisons"
        )
    needed = verdict.seeds_needed
    seeds = f"{needed} seeds of each" if needed is not None else f"more than {MAX_SEEDS:,} seeds of each"
    return (
        f"inconclusive: {measured}; detecting a difference of this size with a power of 80 % would take "
        f"{seeds}."
    )


def _explain_edge(baseline: str, at_edge: Counter[str]) -> str:
    edge = at_edge.most_common(1)[0][0]
    remedy = "smaller sizes, or larger budgets" if edge == "smallest" else "larger sizes, or smaller budgets"
    return (
        f"Same sizes are compared, since the {edge} size of {baseline} is the best at these budgets; a "
        f"comparison of best sizes needs {remedy}."
    )


def _format_budget(axis: Axis, budget: float) -> str:
    if axis == "tokens":
        return f"{format_exact(budget)} tokens"
    return f"{format_duration(budget)} of training" if axis == "seconds" else f"{format_power(budget)} FLOPs"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
