"""Compute- and time-equivalent gain: what the baseline must spend for the candidate's loss, by budget.

outcomes -> the runs of each variant that none beats for less -> a power law of loss over FLOPs (or seconds)
         -> gain(C) = C_baseline(L_candidate(C)) / C, with a band by bootstrap

Above 1 the candidate is worth its cost. Runs are drawn together for all variants (`laws.resampling`), so that
what is hard for both is no noise between them. Which runs are on the frontier is settled once, for all draws.
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
# With fewer amounts spent, E and a power are too much to ask of them.
FEWEST_FOR_IRREDUCIBLE = 5
# A band takes this share of the draws; in the others too few amounts were drawn to lay a law through.
LEAST_SHARE_OF_DRAWS = 0.9


@dataclass(frozen=True)
class Frontier:
    """A variant's best loss by what is spent, between its cheapest and its dearest run on the frontier.

    `draws` holds the law of each bootstrap draw, NaN where a draw could not tell one.
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
        """Whether the amount lies within what was measured (1 %)."""
        return self.lowest * (1 - SAME_LEVEL) <= spent <= self.highest * (1 + SAME_LEVEL)


@dataclass(frozen=True)
class Gain:
    """At one budget: what the candidate gains, and its loss less the baseline's at the same budget.

    None where it would take reading a frontier beyond its runs; `reason` says which. Intervals are None too
    where too few draws tell one, and end at infinity where draws of the baseline never reach the loss.
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
    """The frontiers of variants, with draws that belong together.

    Raises:
        FieldError: a variant has no runs with a loss, or its frontier has a single amount.
    """
    chosen = {variant: _measured(choose_variant(outcomes, variant), variant, axis) for variant in variants}
    repeats = sorted({(*run.cell, run.seed) for runs in chosen.values() for run in runs})
    weights_RC = draw_weights([size for size, _, _ in repeats], num_draws=num_draws, seed=seed)
    column = {repeat: number for number, repeat in enumerate(repeats)}
    return {
        variant: _fit_frontier(
            variant, runs, axis, weights_RC[:, [column[(*run.cell, run.seed)] for run in runs]]
        )
        for variant, runs in chosen.items()
    }


def find_gains(baseline: Frontier, candidate: Frontier, budgets: Sequence[float]) -> tuple[Gain, ...]:
    """The candidate's gain at each budget."""
    return tuple(_find_gain(baseline, candidate, budget) for budget in budgets)


def _find_gain(baseline: Frontier, candidate: Frontier, budget: float) -> Gain:
    name = AXIS_NAMES[candidate.axis]
    if not candidate.covers(budget):
        reason = (
            f"{candidate.variant}'s runs spend between {candidate.lowest:.3g} and {candidate.highest:.3g}"
        )
        return Gain(budget, None, None, None, None, f"{reason} in {name}; it is not read beyond them.")
    difference = difference_interval = gain = gain_interval = None
    reasons = []
    if baseline.covers(budget):
        difference = float(candidate.law.predict(budget) - baseline.law.predict(budget))
        difference_interval = _interval(candidate.draws.predict(budget) - baseline.draws.predict(budget))
    else:
        reasons.append(f"{baseline.variant} has no run on either side of this budget.")
    needed = float(baseline.law.spend_for(candidate.law.predict(budget)))
    if baseline.covers(needed):
        gain = needed / budget
        gain_interval = _interval(baseline.draws.spend_for(candidate.draws.predict(budget)) / budget)
    else:
        side = "more" if needed > baseline.highest else "less"
        reasons.append(
            f"{baseline.variant} would reach {candidate.variant}'s loss with {side} {name} than any of its "
            "runs spent; it is not read beyond them."
        )
    return Gain(budget, gain, gain_interval, difference, difference_interval, " ".join(reasons) or None)


def _interval(draws_R: FloatArray) -> Interval | None:
    known = ~np.isnan(draws_R)
    if known.mean() < LEAST_SHARE_OF_DRAWS:
        return None
    with np.errstate(invalid="ignore"):
        low, high = percentile_interval(draws_R[known])
    # Where many draws never reach the loss, the gain has no upper end.
    return (low, high if math.isfinite(high) else math.inf) if math.isfinite(low) else None


def _measured(runs: Sequence[Outcome], variant: str, axis: Spending) -> list[Outcome]:
    measured = [run for run in runs if getattr(run, axis) is not None]
    if not measured:
        raise FieldError(
            "variant", variant, f"has no run with measured {axis}", "measure, or compare by flops"
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
    told = np.array(
        [count_levels(spent[row > 0]) >= needed if (row > 0).any() else False for row in weights_RI]
    )
    return Frontier(
        variant,
        axis,
        fitted.law,
        PowerLaw(*(np.where(told, value, np.nan) for value in (draws.E, draws.K, draws.gamma))),
        float(spent.min()),
        float(spent.max()),
        levels,
        irreducible,
    )


def _frontier_cells(runs: Sequence[Outcome], axis: Spending) -> set[tuple[str, str]]:
    """The cells on the frontier, in the mean over seeds."""
    cells = sorted({run.cell for run in runs})
    spent, loss = (
        np.array([np.mean([run.known(field) for run in runs if run.cell == cell]) for cell in cells])
        for field in (axis, "loss")
    )
    return {cell for cell, kept in zip(cells, find_frontier(spent, loss), strict=True) if kept}
