"""Compute- and time-equivalent gain: the baseline's budget for the candidate's loss over the candidate's.

cells -> Pareto frontier of each variant -> power law of loss over FLOPs (or seconds)
      -> gain(C) = C_baseline(L_candidate(C)) / C, with an interval

Above 1 the candidate is worth its cost. The predictions of a law are linear in small changes of the losses of
its cells, so that the interval follows from the noise between seeds, as that of any difference
(`seed_noise`). The error of log C_baseline is that of the loss divided by the slope of the baseline's law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.points import SAME_LEVEL, count_levels
from sas_megatron.scaling.laws.power_law import PowerLaw, find_frontier, fit_power_law
from sas_megatron.scaling.matched_cells import VariantCells
from sas_megatron.scaling.outcomes import AXIS_NAMES, Outcome, Spending, choose_variant
from sas_megatron.scaling.seed_noise import Cell, NoiseModel

# With fewer distinct amounts, E cannot be fitted in addition to the power law.
FEWEST_FOR_IRREDUCIBLE = 5
# An E below this share of the lowest loss is at its bound of zero and is not a parameter.
LEAST_IRREDUCIBLE = 1e-3


@dataclass(frozen=True)
class Frontier:
    """The lowest loss of a variant by the amount spent, between the smallest and largest frontier cell."""

    variant: str
    axis: Spending
    law: PowerLaw
    spent: dict[Cell, float]
    losses: dict[Cell, float]
    seconds_error: float

    @property
    def lowest(self) -> float:
        """The smallest amount spent."""
        return min(self.spent.values())

    @property
    def highest(self) -> float:
        """The largest amount spent."""
        return max(self.spent.values())

    def covers(self, spent: float) -> bool:
        """Return whether the amount is within the measured range (with a margin of 1 %)."""
        return self.lowest * (1 - SAME_LEVEL) <= spent <= self.highest * (1 + SAME_LEVEL)

    def weigh_cells(self, spent: float) -> dict[Cell, float]:
        """Return the derivatives of the predicted loss at an amount by the losses of the cells.

        Those of a least squares fit of log losses, linearized at the fitted law.
        """
        law, amounts = self.law, np.array(list(self.spent.values()))

        def gradients(at: object) -> np.ndarray:
            x = np.asarray(at, float)
            loss, power = law.predict(x), law.K * x**-law.gamma
            rows = [power / loss, -power * np.log(x / amounts[0]) / loss]
            if LEAST_IRREDUCIBLE * min(self.losses.values()) < law.E:
                rows.append(law.E / loss)
            return np.array(rows)

        influence = gradients([spent])[:, 0] @ np.linalg.pinv(gradients(amounts)).T
        predicted = float(law.predict(spent))
        return {
            cell: float(weight) * predicted / self.losses[cell]
            for cell, weight in zip(self.spent, influence, strict=True)
        }


@dataclass(frozen=True)
class Gain:
    """The gain of the candidate at one budget.

    A gain that would need extrapolation is None, and `reason` states why. The interval is None too without an
    estimate of the noise.
    """

    budget: float
    gain: float | None
    interval: tuple[float, float] | None
    degrees: float | None
    reason: str | None


def fit_frontier(outcomes: Sequence[Outcome], noise: NoiseModel, variant: str, *, axis: Spending) -> Frontier:
    """Fit the frontier of a variant.

    Args:
        outcomes: The runs of all variants.
        noise: The noise of these runs.
        variant: Name of the variant.
        axis: The amount spent.

    Raises:
        FieldError: The variant has no measured run, or its frontier has fewer than two distinct amounts.
    """
    cells = VariantCells.of(choose_variant(outcomes, variant), noise)
    amounts = cells.amounts[axis]
    if not amounts:
        raise FieldError(
            "variant", variant, f"has no run with measured {axis}", "measure them, or compare by FLOPs"
        )
    losses = {cell: cells.losses[cell] for cell in amounts}
    kept = find_frontier(np.array(list(amounts.values())), np.array(list(losses.values())))
    on_frontier = [cell for cell, is_kept in zip(amounts, kept, strict=True) if is_kept]
    spent = np.array([amounts[cell] for cell in on_frontier])
    fitted = fit_power_law(
        spent,
        np.array([losses[cell] for cell in on_frontier]),
        irreducible=count_levels(spent) >= FEWEST_FOR_IRREDUCIBLE,
        # Least squares, of which the predictions are linear in small changes of the losses.
        delta=np.inf,
    )
    return Frontier(
        variant,
        axis,
        fitted.law,
        {cell: amounts[cell] for cell in on_frontier},
        {cell: losses[cell] for cell in on_frontier},
        (cells.seconds_error or 0.0) if axis == "seconds" else 0.0,
    )


def find_gain(baseline: Frontier, candidate: Frontier, noise: NoiseModel, budget: float) -> Gain:
    """Return the candidate's gain at a budget."""
    name = AXIS_NAMES[candidate.axis]
    if not candidate.covers(budget):
        span = f"{candidate.lowest:.3g} and {candidate.highest:.3g}"
        reason = f"the runs of {candidate.variant} are between {span} in {name}"
        return Gain(budget, None, None, None, f"{reason}; losses are not extrapolated.")
    loss = float(candidate.law.predict(budget))
    needed = float(baseline.law.spend_for(loss))
    if not baseline.covers(needed):
        side = "more" if needed > baseline.highest else "less"
        reason = (
            f"{baseline.variant} would reach the loss of {candidate.variant} with {side} {name} than any of "
            "its runs; losses are not extrapolated."
        )
        return Gain(budget, None, None, None, reason)
    law = baseline.law
    slope = float(law.gamma * law.K * needed**-law.gamma)
    time_error = math.hypot(baseline.seconds_error, candidate.seconds_error)
    estimate = noise.estimate(
        0.0,
        candidate=candidate.variant,
        baseline=baseline.variant,
        weights=(candidate.weigh_cells(budget), baseline.weigh_cells(needed)),
        others=[((slope * time_error) ** 2, math.inf)] if time_error else [],
    )
    gain = needed / budget
    if estimate.interval is None:
        return Gain(budget, gain, None, None, None)
    half_width = estimate.interval[1] / slope
    interval = (gain * math.exp(-half_width), gain * math.exp(half_width))
    return Gain(budget, gain, interval, estimate.degrees, None)
