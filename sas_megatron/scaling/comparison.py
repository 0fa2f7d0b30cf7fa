"""Comparison of variants with the baseline: verdicts by axis, gains by budget, laws, and steps saved.

outcomes -> at equal parameters, tokens, FLOPs, time: which loss is lower, and is it more than noise
         -> frontiers -> compute- and time-equivalent gain
         -> laws -> test of a shared irreducible loss
curves   -> steps saved to reach a loss
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sas_megatron.scaling.convergence import MeanSaving, find_savings
from sas_megatron.scaling.gains import Gain, Spending, find_gains, fit_frontiers
from sas_megatron.scaling.laws.law_fit import Attempts
from sas_megatron.scaling.laws.shared_irreducible import SharedIrreducible, compare_irreducible
from sas_megatron.scaling.outcomes import AXES, LossCurve, Outcome, gather_points
from sas_megatron.scaling.seed_noise import adjust_p_values
from sas_megatron.scaling.verdicts import Verdict, judge_variants

NUM_BUDGETS = 9


@dataclass(frozen=True)
class Comparison:
    """A candidate against the baseline. Results that the runs do not allow are None; `remarks` state why."""

    baseline: str
    candidate: str
    verdicts: tuple[Verdict, ...]
    compute_gains: tuple[Gain, ...] | None = None
    time_gains: tuple[Gain, ...] | None = None
    irreducible: SharedIrreducible | None = None
    savings: tuple[MeanSaving, ...] = ()
    remarks: tuple[str, ...] = ()


def compare_variants(
    outcomes: Sequence[Outcome],
    curves: Sequence[LossCurve] = (),
    *,
    baseline: str,
    candidates: Sequence[str],
    num_draws: int = 1000,
    seed: int = 1,
) -> tuple[Comparison, ...]:
    """Compare each candidate with the baseline in every way that the runs allow.

    The p-values of all candidates on an axis are adjusted for their number, and so are the p-values of the
    tests of a shared irreducible loss.

    Args:
        outcomes: The finished runs of all variants.
        curves: Their validation curves, for the steps saved.
        baseline: Name of the variant to compare with.
        candidates: Names of the variants to judge.
        num_draws: Bootstrap draws for the gains.
        seed: Seed of the bootstrap.

    Raises:
        FieldError: One of the variants has no run with a loss.
    """
    by_axis = [judge_variants(outcomes, baseline=baseline, candidates=candidates, axis=axis) for axis in AXES]
    return _adjust_irreducible(
        [
            _compare(outcomes, curves, verdicts, num_draws=num_draws, seed=seed)
            for verdicts in zip(*by_axis, strict=True)
        ]
    )


def _adjust_irreducible(comparisons: Sequence[Comparison]) -> tuple[Comparison, ...]:
    """Adjust the p-values of the tests of a shared irreducible loss for their number."""
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
    verdicts: tuple[Verdict, ...],
    *,
    num_draws: int,
    seed: int,
) -> Comparison:
    baseline, candidate = verdicts[0].baseline, verdicts[0].candidate
    attempts = Attempts()

    def gains(axis: Spending) -> tuple[Gain, ...]:
        frontiers = fit_frontiers(outcomes, (baseline, candidate), axis=axis, num_draws=num_draws, seed=seed)
        frontier = frontiers[candidate]
        budgets = np.geomspace(frontier.lowest, frontier.highest, NUM_BUDGETS).tolist()
        return find_gains(frontiers[baseline], frontier, budgets)

    return Comparison(
        baseline=baseline,
        candidate=candidate,
        verdicts=verdicts,
        compute_gains=attempts.run("compute-equivalent gain", lambda: gains("flops")),
        time_gains=attempts.run("time-equivalent gain", lambda: gains("seconds")),
        irreducible=attempts.run(
            "test of a shared irreducible loss",
            lambda: compare_irreducible(
                {name: gather_points(outcomes, name) for name in (baseline, candidate)}
            ),
        ),
        savings=find_savings(curves, reference=baseline, candidate=candidate),
        # Evaluated last, after all attempts.
        remarks=tuple(attempts.remarks),
    )
