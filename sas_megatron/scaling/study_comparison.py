"""Variants of a study beside its baseline: verdicts by axis, gains by budget, laws, and steps saved.

outcomes -> at equal parameters, tokens, FLOPs, time: who is lower, and is it more than noise
         -> frontiers -> compute- and time-equivalent gain
         -> laws -> do both approach one irreducible loss
curves   -> steps saved to a loss
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sas_megatron.scaling.attempts import Attempts
from sas_megatron.scaling.convergence import MeanSaving, find_savings
from sas_megatron.scaling.gains import Gain, Spending, find_gains, fit_frontiers
from sas_megatron.scaling.laws.shared_irreducible import SharedIrreducible, compare_irreducible
from sas_megatron.scaling.outcomes import AXES, LossCurve, Outcome, gather_points
from sas_megatron.scaling.seed_noise import adjust_p_values
from sas_megatron.scaling.verdicts import AxisVerdict, judge_together

NUM_BUDGETS = 9


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
    candidates: Sequence[str],
    num_draws: int = 1000,
    seed: int = 1,
) -> tuple[StudyComparison, ...]:
    """Compares candidates with the baseline in every way that the runs allow.

    The verdicts of an axis are judged together, and so are the tests of shared irreducible losses.

    Raises:
        FieldError: one of them has no run with a loss.
    """
    by_axis = [judge_together(outcomes, baseline=baseline, candidates=candidates, axis=axis) for axis in AXES]
    return _adjust_irreducible(
        [
            _compare(outcomes, curves, baseline, candidate, verdicts, num_draws=num_draws, seed=seed)
            for candidate, verdicts in zip(candidates, zip(*by_axis, strict=True), strict=True)
        ]
    )


def _adjust_irreducible(comparisons: Sequence[StudyComparison]) -> tuple[StudyComparison, ...]:
    """The same, with p-values of irreducible losses that are those of as many tests as there are."""
    tests = [comparison.irreducible for comparison in comparisons]
    adjusted = iter(adjust_p_values([test.p_value for test in tests if test is not None]))
    return tuple(
        comparison
        if test is None
        else dataclasses.replace(comparison, irreducible=dataclasses.replace(test, p_value=next(adjusted)))
        for comparison, test in zip(comparisons, tests, strict=True)
    )


def _compare(
    outcomes: Sequence[Outcome],
    curves: Sequence[LossCurve],
    baseline: str,
    candidate: str,
    verdicts: tuple[AxisVerdict, ...],
    *,
    num_draws: int,
    seed: int,
) -> StudyComparison:
    attempts = Attempts()

    def gains(axis: Spending) -> tuple[Gain, ...]:
        frontiers = fit_frontiers(outcomes, (baseline, candidate), axis=axis, num_draws=num_draws, seed=seed)
        own = frontiers[candidate]
        budgets = np.geomspace(own.lowest, own.highest, NUM_BUDGETS).tolist()
        return find_gains(frontiers[baseline], own, budgets)

    return StudyComparison(
        baseline=baseline,
        candidate=candidate,
        verdicts=verdicts,
        compute_gains=attempts.make("compute-equivalent gain", lambda: gains("flops")),
        time_gains=attempts.make("time-equivalent gain", lambda: gains("seconds")),
        irreducible=attempts.make(
            "test of a shared irreducible loss",
            lambda: compare_irreducible(
                {name: gather_points(outcomes, name) for name in (baseline, candidate)}
            ),
        ),
        savings=find_savings(curves, reference=baseline, candidate=candidate),
        # Last, when all has been tried.
        remarks=tuple(attempts.remarks),
    )
