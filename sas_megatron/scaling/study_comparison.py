"""Two variants of a study side by side: verdicts by axis, gains by budget, laws, and steps saved.

outcomes -> at equal parameters, tokens, FLOPs, time: who is lower, and is it more than noise
         -> frontiers -> compute- and time-equivalent gain
         -> laws -> do both approach one irreducible loss
curves   -> steps saved to a loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.convergence import MeanSaving, find_savings
from sas_megatron.scaling.gains import Gain, Spending, find_gains, fit_frontiers
from sas_megatron.scaling.laws.shared_irreducible import SharedIrreducible, compare_irreducible
from sas_megatron.scaling.outcomes import AXES, LossCurve, Outcome, gather_points
from sas_megatron.scaling.verdicts import AxisVerdict, judge_axis

NUM_BUDGETS = 9
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class StudyComparison:
    """A candidate against the baseline. What the runs do not allow is None, and why is among the remarks."""

    baseline: str
    candidate: str
    verdicts: tuple[AxisVerdict, ...]
    compute_gains: tuple[Gain, ...] | None
    time_gains: tuple[Gain, ...] | None
    irreducible: SharedIrreducible | None
    savings: tuple[MeanSaving, ...]
    remarks: tuple[str, ...]


def compare_variants(
    outcomes: Sequence[Outcome],
    curves: Sequence[LossCurve] = (),
    *,
    baseline: str,
    candidate: str,
    num_draws: int = 1000,
    seed: int = 1,
) -> StudyComparison:
    """Compares a candidate with the baseline in every way that the runs allow.

    Raises:
        FieldError: one of them has no run with a loss.
    """
    remarks: list[str] = []

    def attempt(what: str, function: Callable[[], _Result]) -> _Result | None:
        try:
            return function()
        except FieldError as error:
            remarks.append(f"No {what}: {error}.")
            return None

    def gains(axis: Spending) -> tuple[Gain, ...]:
        frontiers = fit_frontiers(outcomes, (baseline, candidate), axis=axis, num_draws=num_draws, seed=seed)
        own = frontiers[candidate]
        budgets = np.geomspace(own.lowest, own.highest, NUM_BUDGETS).tolist()
        return find_gains(frontiers[baseline], own, budgets)

    return StudyComparison(
        baseline=baseline,
        candidate=candidate,
        verdicts=tuple(
            judge_axis(outcomes, baseline=baseline, candidate=candidate, axis=axis) for axis in AXES
        ),
        compute_gains=attempt("compute-equivalent gain", lambda: gains("flops")),
        time_gains=attempt("time-equivalent gain", lambda: gains("seconds")),
        irreducible=attempt(
            "test of a shared irreducible loss",
            lambda: compare_irreducible(
                {name: gather_points(outcomes, name) for name in (baseline, candidate)}
            ),
        ),
        savings=find_savings(curves, reference=baseline, candidate=candidate),
        remarks=tuple(remarks),
    )
