"""Analysis of a study's table: laws of all variants and their comparison with the baseline, in each slice.

A slice is one level of every axis that all variants have, for example a sequence length. Losses of different
slices are not compared. A level of an axis that only some variants have becomes part of the variant's name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.analysis_of_variance import analyze_variance
from sas_megatron.scaling.comparison import Comparison, compare_candidates, compare_variants
from sas_megatron.scaling.laws.law_fit import LawFit, fit_law
from sas_megatron.scaling.laws.loss_surface import TokenCost, optimal_exponents
from sas_megatron.scaling.outcomes import LossCurve, Outcome, choose_variant, gather_points
from sas_megatron.scaling.seed_noise import NoiseModel, Outlier
from sas_megatron.scaling.study.study_table import Row, StudyTable
from sas_megatron.scaling.verdicts import model_noise


@dataclass(frozen=True)
class Slice:
    """Comparable rows by the name of their variant; the baseline comes first."""

    name: str
    rows: dict[str, tuple[Row, ...]]

    @property
    def outcomes(self) -> list[Outcome]:
        """The runs that were trained; a diverged run has no loss.

        Their seconds are steps × measured seconds per step (`study time`) if all rows have them, otherwise
        the training time of each run.
        """
        all_rows = [row for rows in self.rows.values() for row in rows]
        error = _estimate_time_error(all_rows) if self.has_step_times else None
        return [
            _build_outcome(variant, row, has_step_times=self.has_step_times, seconds_error=error)
            for variant, rows in self.rows.items()
            for row in rows
            if row.status != "missing"
        ]

    @property
    def has_step_times(self) -> bool:
        """Whether all rows have comparable seconds per step."""
        return all(row.step_seconds is not None for rows in self.rows.values() for row in rows)

    @property
    def curves(self) -> list[LossCurve]:
        """Validation losses by step."""
        return [
            _build_curve(variant, row)
            for variant, rows in self.rows.items()
            for row in rows
            if row.curve_loss
        ]


@dataclass(frozen=True)
class VariantLaw:
    """The law of one variant. If it could not be fitted, `fit` is None and `reason` states why.

    `causal_exponents` are the compute-optimal exponents with the FLOPs of the causal half.
    """

    variant: str
    fit: LawFit | None = None
    causal_exponents: dict[str, float] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class SliceAnalysis:
    """The results of one slice."""

    slice: Slice
    laws: tuple[VariantLaw, ...]
    comparisons: tuple[Comparison, ...]
    noise: NoiseModel | None
    outliers: tuple[Outlier, ...]
    remarks: tuple[str, ...]


def analyze(table: StudyTable, *, num_draws: int = 1000, seed: int = 1) -> tuple[SliceAnalysis, ...]:
    """Fit laws and compare variants; remarks name the results for which the runs are insufficient.

    Args:
        table: The collected table.
        num_draws: Bootstrap draws.
        seed: Seed of the bootstrap.
    """
    return tuple(
        _analyze_slice(part, table.withdrawn, num_draws=num_draws, seed=seed) for part in cut_slices(table)
    )


def cut_slices(table: StudyTable) -> tuple[Slice, ...]:
    """Return the slices in the order of the table."""
    shared = [
        axis
        for axis in dict.fromkeys(axis for row in table.rows for axis in row.levels)
        if all(axis in row.levels for row in table.rows)
    ]
    slices: dict[str, dict[str, list[Row]]] = {}
    for row in table.rows:
        name = ", ".join(f"{axis} {row.levels[axis]}" for axis in shared)
        extra = [level for axis, level in row.levels.items() if axis not in shared]
        variant = "-".join([row.variant, *extra])
        slices.setdefault(name, {}).setdefault(variant, []).append(row)
    return tuple(
        Slice(name, {variant: tuple(rows) for variant, rows in _baseline_first(by_variant, table.baseline)})
        for name, by_variant in slices.items()
    )


def _baseline_first(by_variant: dict[str, list[Row]], baseline: str) -> Sequence[tuple[str, list[Row]]]:
    return sorted(by_variant.items(), key=lambda item: item[1][0].variant != baseline)


def _analyze_slice(part: Slice, withdrawn: Mapping[str, str], *, num_draws: int, seed: int) -> SliceAnalysis:
    outcomes, curves = part.outcomes, part.curves
    known = {outcome.variant for outcome in outcomes if outcome.loss is not None}
    first, *others = part.rows
    laws = tuple(
        _fit_law(outcomes, variant, num_draws=num_draws, seed=seed)
        for variant in part.rows
        if variant not in withdrawn
    )
    if first not in known:
        reason = f"The baseline {first} has no finished run: no variant can be compared."
        return SliceAnalysis(part, laws, (), None, (), (reason,))
    candidates = [variant for variant in others if variant in known and variant not in withdrawn]
    noise = model_noise(outcomes)
    comparisons = compare_variants(outcomes, curves, noise=noise, baseline=first, candidates=candidates)
    remarks = [*compare_candidates(outcomes, noise, candidates)]
    remarks += [f"{variant} has no finished run." for variant in others if variant not in known]
    remarks += [
        f"The results of {variant} are withdrawn: {reason}"
        for variant, reason in withdrawn.items()
        if variant in part.rows
    ]
    return SliceAnalysis(part, laws, comparisons, noise, noise.find_outliers(), tuple(remarks))


def _fit_law(outcomes: Sequence[Outcome], variant: str, *, num_draws: int, seed: int) -> VariantLaw:
    try:
        fit = fit_law(gather_points(outcomes, variant), num_draws=num_draws, seed=seed)
    except FieldError as error:
        return VariantLaw(variant, reason=str(error))
    if fit.ci95["E"][0] <= 0:
        reason = "the runs do not determine an irreducible loss: its 95 % interval begins at zero"
        return VariantLaw(variant, reason=reason)
    causal = np.array([run.causal_flops for run in choose_variant(outcomes, variant)])
    cost = TokenCost.of(dataclasses.replace(fit.fit.points, flops=causal))
    single = {name: np.array([value]) for name, value in dataclasses.asdict(fit.fit.surface).items()}
    exponents = {name: float(value[0]) for name, value in optimal_exponents(single, cost).items()}
    return VariantLaw(variant, fit, exponents)


def _estimate_time_error(rows: Iterable[Row]) -> float | None:
    """Return the relative standard error of a median step time; None without repeated rounds.

    The variance of the logarithms, without the effects of cells and rounds, is pooled over the cells. The
    variance of a median of n normal values is at most π/2n times that of a value.
    """
    rounds = {(row.variant, row.size): row.step_rounds for row in rows}
    fewest = min(map(len, rounds.values()), default=0)
    logs = [dict(enumerate(np.log(times[:fewest]).tolist())) for times in rounds.values() if fewest > 1]
    sums = analyze_variance(logs)
    if not sums.interaction_degrees:
        return None
    return math.sqrt(math.pi / (2 * fewest) * sums.interaction / sums.interaction_degrees)


def _build_outcome(variant: str, row: Row, *, has_step_times: bool, seconds_error: float | None) -> Outcome:
    seconds = row.training_seconds
    if has_step_times and row.step_seconds is not None:
        seconds = row.step_seconds * row.steps
    return Outcome(
        variant=variant,
        size=row.size,
        budget=f"{row.budget:g}",
        seed=row.seed,
        params=row.params,
        tokens=row.tokens,
        flops=row.training_flops,
        causal_flops=row.causal_flops,
        seconds=seconds,
        loss=row.loss,
        seconds_error=seconds_error,
        epochs=row.epochs,
    )


def _build_curve(variant: str, row: Row) -> LossCurve:
    points = [
        (step, loss) for step, loss in zip(row.curve_steps, row.curve_loss, strict=True) if loss is not None
    ]
    return LossCurve(
        variant=variant,
        size=row.size,
        budget=f"{row.budget:g}",
        seed=row.seed,
        schedule=row.schedule,
        planned_steps=row.steps,
        tokens_per_step=row.tokens / row.steps,
        steps=tuple(step for step, _ in points),
        losses=tuple(loss for _, loss in points),
        learning_rate=row.learning_rate,
    )
