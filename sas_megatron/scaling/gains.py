"""Compute- and time-equivalent gain: the baseline's budget for the candidate's loss over the candidate's.

outcomes -> Pareto frontier of each variant -> power law of loss over FLOPs (or seconds)
         -> gain(C) = C_baseline(L_candidate(C)) / C, with a bootstrap band

Above 1 the candidate is worth its cost. The bootstrap draws runs jointly for all variants
(`laws.resampling`), so that errors that they share cancel. The frontier is determined once, not for each
draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import FloatArray
from sas_megatron.scaling.laws.points import SAME_LEVEL, count_levels
from sas_megatron.scaling.laws.power_law import PowerLaw, find_frontier, fit_power_law
from sas_megatron.scaling.laws.resampling import Interval, draw_weights, percentile_interval
from sas_megatron.scaling.outcomes import AXIS_NAMES, Outcome, choose_variant

Spending = Literal["flops", "seconds"]
# With fewer distinct amounts, E cannot be fitted in addition to the power law.
FEWEST_FOR_IRREDUCIBLE = 5
# A band needs this share of the draws; in the others, too few distinct amounts were drawn for a law.
LEAST_SHARE_OF_DRAWS = 0.9


@dataclass(frozen=True)
class Frontier:
    """The lowest loss of a variant by the amount spent, between the smallest and largest run on the frontier.

    `draws` holds the law of each bootstrap draw, NaN if a draw does not determine it.
    """

    variant: str
    axis: Spending
    law: PowerLaw
    draws: PowerLaw
    lowest: float
    highest: float
    num_levels: int
    irreducible: bool

    def covers(self, spent: float) -> bool:
        """Return whether the amount is within the measured range (with a margin of 1 %)."""
        return self.lowest * (1 - SAME_LEVEL) <= spent <= self.highest * (1 + SAME_LEVEL)


@dataclass(frozen=True)
class Gain:
    """The gain of the candidate at one budget, and its loss minus the baseline's at the same budget.

    Values that would need extrapolation are None, and `reason` states why. Intervals are also None if too few
    draws determine them; they end at infinity if draws of the baseline never reach the loss.
    """

    budget: float
    gain: float | None
    gain_interval: Interval | None
    difference: float | None
    difference_interval: Interval | None
    reason: str | None


def fit_frontiers(
    outcomes: Sequence[Outcome],
    variants: Sequence[str],
    *,
    axis: Spending,
    num_draws: int = 1000,
    seed: int = 1,
) -> dict[str, Frontier]:
    """Fit the frontiers of variants with joint bootstrap draws.

    Args:
        outcomes: The runs of all variants.
        variants: Names of the variants.
        axis: The amount spent.
        num_draws: Bootstrap draws.
        seed: Seed of the bootstrap.

    Raises:
        FieldError: A variant has no runs with a loss, or its frontier has fewer than two distinct amounts.
    """
    chosen = {variant: _measured(choose_variant(outcomes, variant), variant, axis) for variant in variants}
    runs_of_all = sorted({(*run.cell, run.seed) for runs in chosen.values() for run in runs})
    weights_RC = draw_weights([size for size, _, _ in runs_of_all], num_draws=num_draws, seed=seed)
    column = {run: number for number, run in enumerate(runs_of_all)}
    return {
        variant: _fit_frontier(
            variant, runs, axis, weights_RC[:, [column[(*run.cell, run.seed)] for run in runs]]
        )
        for variant, runs in chosen.items()
    }


def find_gains(baseline: Frontier, candidate: Frontier, budgets: Sequence[float]) -> tuple[Gain, ...]:
    """Return the candidate's gain at each budget."""
    return tuple(_find_gain(baseline, candidate, budget) for budget in budgets)


def _find_gain(baseline: Frontier, candidate: Frontier, budget: float) -> Gain:
    name = AXIS_NAMES[candidate.axis]
    if not candidate.covers(budget):
        reason = (
            f"the runs of {candidate.variant} are between {candidate.lowest:.3g} and {candidate.highest:.3g}"
        )
        return Gain(budget, None, None, None, None, f"{reason} in {name}; losses are not extrapolated.")
    difference = difference_interval = gain = gain_interval = None
    reasons = []
    if baseline.covers(budget):
        difference = float(candidate.law.predict(budget) - baseline.law.predict(budget))
        difference_interval = _interval(candidate.draws.predict(budget) - baseline.draws.predict(budget))
    else:
        reasons.append(f"The runs of {baseline.variant} do not enclose this budget.")
    needed = float(baseline.law.spend_for(candidate.law.predict(budget)))
    if baseline.covers(needed):
        gain = needed / budget
        gain_interval = _interval(baseline.draws.spend_for(candidate.draws.predict(budget)) / budget)
    else:
        side = "more" if needed > baseline.highest else "less"
        reasons.append(
            f"{baseline.variant} would reach the loss of {candidate.variant} with {side} {name} than any of "
            "its runs; losses are not extrapolated."
        )
    return Gain(budget, gain, gain_interval, difference, difference_interval, " ".join(reasons) or None)


def _interval(draws_R: FloatArray) -> Interval | None:
    known = ~np.isnan(draws_R)
    if known.mean() < LEAST_SHARE_OF_DRAWS:
        return None
    with np.errstate(invalid="ignore"):
        low, high = percentile_interval(draws_R[known])
    # If many draws never reach the loss, the gain has no upper end.
    return (low, high if math.isfinite(high) else math.inf) if math.isfinite(low) else None


def _measured(runs: Sequence[Outcome], variant: str, axis: Spending) -> list[Outcome]:
    measured = [run for run in runs if getattr(run, axis) is not None]
    if not measured:
        raise FieldError(
            "variant", variant, f"has no run with measured {axis}", "measure them, or compare by FLOPs"
        )
    return measured


def _fit_frontier(variant: str, runs: Sequence[Outcome], axis: Spending, weights_RI: FloatArray) -> Frontier:
    on_frontier = _frontier_cells(runs, axis)
    kept = [number for number, run in enumerate(runs) if run.cell in on_frontier]
    spent = np.array([runs[number].known(axis) for number in kept])
    loss = np.array([runs[number].known("loss") for number in kept])
    levels = count_levels(spent)
    irreducible = levels >= FEWEST_FOR_IRREDUCIBLE
    fitted = fit_power_law(spent, loss, irreducible=irreducible)
    weights_RI = weights_RI[:, kept]
    draws = fitted.refit(weights_RI)
    needed = 3 if irreducible else 2
    is_determined = np.array(
        [count_levels(spent[row > 0]) >= needed if (row > 0).any() else False for row in weights_RI]
    )
    return Frontier(
        variant,
        axis,
        fitted.law,
        PowerLaw(*(np.where(is_determined, value, np.nan) for value in (draws.E, draws.K, draws.gamma))),
        float(spent.min()),
        float(spent.max()),
        levels,
        irreducible,
    )


def _frontier_cells(runs: Sequence[Outcome], axis: Spending) -> set[tuple[str, str]]:
    """Return the cells on the Pareto frontier of the means over seeds."""
    cells = sorted({run.cell for run in runs})
    spent, loss = (
        np.array([np.mean([run.known(field) for run in runs if run.cell == cell]) for cell in cells])
        for field in (axis, "loss")
    )
    return {cell for cell, kept in zip(cells, find_frontier(spent, loss), strict=True) if kept}
