"""Comparison of variants with the baseline: verdicts by axis, gains by budget, and steps saved.

outcomes -> at equal parameters, tokens, FLOPs, time: which loss is lower, and is it more than noise
         -> frontiers -> compute- and time-equivalent gain
curves   -> steps saved to reach a loss
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.convergence import MeanSaving, find_savings
from sas_megatron.scaling.gains import Gain, find_gain, fit_frontier
from sas_megatron.scaling.matched_cells import VariantCells, match_sizes
from sas_megatron.scaling.numbers import format_difference, format_p_value
from sas_megatron.scaling.outcomes import (
    AXES,
    AXIS_NAMES,
    SPENDING,
    Axis,
    LossCurve,
    Outcome,
    Spending,
    choose_variant,
)
from sas_megatron.scaling.seed_noise import NoiseModel
from sas_megatron.scaling.significance import LEVEL, adjust_p_values
from sas_megatron.scaling.verdicts import Verdict, estimate_mean, judge_variants, model_noise

NUM_BUDGETS = 9


@dataclass(frozen=True)
class Comparison:
    """A candidate against the baseline.

    `gains` lacks the axes on which the runs do not allow them; `remarks` state why.
    """

    baseline: str
    candidate: str
    verdicts: tuple[Verdict, ...]
    gains: Mapping[Spending, tuple[Gain, ...]] = field(default_factory=dict)
    savings: tuple[MeanSaving, ...] = ()
    remarks: tuple[str, ...] = ()

    def verdict(self, axis: Axis) -> Verdict:
        """Return the verdict on an axis."""
        return next(verdict for verdict in self.verdicts if verdict.axis == axis)


def compare_variants(
    outcomes: Sequence[Outcome],
    curves: Sequence[LossCurve] = (),
    *,
    baseline: str,
    candidates: Sequence[str],
    noise: NoiseModel | None = None,
) -> tuple[Comparison, ...]:
    """Compare each candidate with the baseline in every way that the runs allow.

    The p-values of all candidates on an axis are adjusted for their number.

    Args:
        outcomes: The finished runs of all variants.
        curves: Their validation curves, for the steps saved.
        baseline: Name of the variant to compare with.
        candidates: Names of the variants to judge.
        noise: The noise of the runs; None to estimate it.

    Raises:
        FieldError: One of the variants has no run with a loss.
    """
    noise = noise or model_noise(outcomes)
    by_axis = [
        judge_variants(outcomes, baseline=baseline, candidates=candidates, axis=axis, noise=noise)
        for axis in AXES
    ]
    comparisons = []
    for verdicts in zip(*by_axis, strict=True):
        candidate = verdicts[0].candidate
        gains, remarks = _find_gains(outcomes, noise, baseline, candidate)
        savings = find_savings(curves, reference=baseline, candidate=candidate)
        remarks = (*remarks, *_compare_conventions(verdicts, gains))
        comparisons.append(Comparison(baseline, candidate, verdicts, gains, savings, remarks))
    return tuple(comparisons)


def compare_candidates(
    outcomes: Sequence[Outcome], noise: NoiseModel, candidates: Sequence[str]
) -> tuple[str, ...]:
    """State which candidates differ from each other at equal tokens.

    The p-values of all pairs are adjusted for their number by Holm's method.
    """
    cells = {variant: VariantCells.of(choose_variant(outcomes, variant), noise) for variant in candidates}
    tested = []
    for one, other in itertools.combinations(candidates, 2):
        matched, _ = match_sizes(cells[other], cells[one], "tokens")
        if matched:
            estimate = estimate_mean(matched, noise, candidate=other, baseline=one)
            if estimate.p_value is not None:
                tested.append((one, other, estimate.p_value))
    if not tested:
        return ()
    adjusted = adjust_p_values([p_value for *_, p_value in tested])
    names = ", ".join(candidates)
    if min(adjusted) >= 1 - LEVEL:
        lowest = format_p_value(min(adjusted))
        return (
            f"Of {names}, no two are shown to differ from each other at equal tokens (lowest "
            f"{lowest} of {len(tested)} pairs).",
        )
    pairs = [
        f"{one} and {other} ({format_p_value(p_value)})"
        for (one, other, _), p_value in zip(tested, adjusted, strict=True)
        if p_value < 1 - LEVEL
    ]
    return (f"Of {names}, these differ from each other at equal tokens: {', '.join(pairs)}.",)


def _find_gains(
    outcomes: Sequence[Outcome], noise: NoiseModel, baseline: str, candidate: str
) -> tuple[dict[Spending, tuple[Gain, ...]], tuple[str, ...]]:
    """Return the gains by axis, and for the other axes remarks why there are none."""
    found: dict[Spending, tuple[Gain, ...]] = {}
    reasons: dict[str, list[str]] = {}
    for axis in SPENDING:
        try:
            base, other = (
                fit_frontier(outcomes, noise, variant, axis=axis) for variant in (baseline, candidate)
            )
        except FieldError as error:
            reasons.setdefault(str(error), []).append(AXIS_NAMES[axis])
            continue
        budgets = np.geomspace(other.lowest, other.highest, NUM_BUDGETS)
        found[axis] = tuple(find_gain(base, other, noise, budget) for budget in budgets.tolist())
    remarks = (f"No gain in {', '.join(axes)}: {reason}." for reason, axes in reasons.items())
    return found, tuple(remarks)


def _compare_conventions(verdicts: Sequence[Verdict], gains: Mapping[Spending, Sequence[Gain]]) -> list[str]:
    """State where the sign of a result depends on the convention of the attention FLOPs."""
    remarks = []
    full, half = (verdict.difference for verdict in verdicts if verdict.axis in ("flops", "causal_flops"))
    if full is not None and half is not None and full * half < 0:
        remarks.append(
            "The sign at equal FLOPs depends on the convention of the attention FLOPs: "
            f"{format_difference(full)} with all S² pairs, {format_difference(half)} with the causal half."
        )
    pairs = zip(gains.get("flops", ()), gains.get("causal_flops", ()), strict=False)
    if any(one.gain and other.gain and (one.gain - 1) * (other.gain - 1) < 0 for one, other in pairs):
        remarks.append(
            "Whether the compute-equivalent gain is above 1 depends on the convention of the attention FLOPs "
            "at some budgets."
        )
    return remarks
