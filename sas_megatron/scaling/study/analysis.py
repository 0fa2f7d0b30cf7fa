"""The study's table -> what it says: for each slice the laws of all variants, and each against the baseline.

A slice is a value of every axis that all variants have (a sequence length, say): losses of different
slices are not compared. A level of an axis that only some variants have is part of a variant's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.fit_report import FitReport, build_fit_report
from sas_megatron.scaling.outcomes import LossCurve, Outcome, gather_points
from sas_megatron.scaling.study.table import Row, StudyTable
from sas_megatron.scaling.study_comparison import StudyComparison, compare_variants


@dataclass(frozen=True)
class Slice:
    """Rows that may stand side by side, by the name of their variant; the baseline's come first."""

    name: str
    rows: dict[str, tuple[Row, ...]]

    @property
    def outcomes(self) -> list[Outcome]:
        """Of the runs that were made; one that diverged has no loss.

        Seconds are those of steps measured in turn, or, where one lacks them, all of each run's own training.
        """
        return [
            _outcome(variant, row, in_turn=self.is_timed_in_turn)
            for variant, rows in self.rows.items()
            for row in rows
            if row.status != "missing"
        ]

    @property
    def is_timed_in_turn(self) -> bool:
        """Whether all rows have seconds of a step that compare."""
        return all(row.step_seconds is not None for rows in self.rows.values() for row in rows)

    @property
    def curves(self) -> list[LossCurve]:
        """Validation losses by step."""
        return [_curve(variant, row) for variant, rows in self.rows.items() for row in rows if row.curve_loss]


@dataclass(frozen=True)
class VariantLaw:
    """The law of one variant; without a report, the reason why there is none."""

    variant: str
    report: FitReport | None
    reason: str | None


@dataclass(frozen=True)
class SliceAnalysis:
    """What one slice says."""

    slice: Slice
    laws: tuple[VariantLaw, ...]
    comparisons: tuple[StudyComparison, ...]
    remarks: tuple[str, ...]


def analyze(table: StudyTable, *, num_draws: int = 1000, seed: int = 1) -> tuple[SliceAnalysis, ...]:
    """Fits and compares all that the runs allow; what they do not is told among the remarks.

    Args:
        table: The study's.
        num_draws: Of the bootstrap.
        seed: Of the draws.
    """
    return tuple(_analyze_slice(part, num_draws=num_draws, seed=seed) for part in cut_slices(table))


def cut_slices(table: StudyTable) -> tuple[Slice, ...]:
    """The slices in the order of the table; each with the baseline's variant first."""
    shared = [
        axis
        for axis in dict.fromkeys(axis for row in table.rows for axis in row.levels)
        if all(axis in row.levels for row in table.rows)
    ]
    slices: dict[str, dict[str, list[Row]]] = {}
    for row in table.rows:
        name = ", ".join(f"{axis} {row.levels[axis]}" for axis in shared)
        own = [level for axis, level in row.levels.items() if axis not in shared]
        variant = "-".join([row.variant, *own])
        slices.setdefault(name, {}).setdefault(variant, []).append(row)
    return tuple(
        Slice(name, {variant: tuple(rows) for variant, rows in _baseline_first(by_variant, table.baseline)})
        for name, by_variant in slices.items()
    )


def _baseline_first(by_variant: dict[str, list[Row]], baseline: str) -> Sequence[tuple[str, list[Row]]]:
    return sorted(by_variant.items(), key=lambda item: item[1][0].variant != baseline)


def _analyze_slice(part: Slice, *, num_draws: int, seed: int) -> SliceAnalysis:
    outcomes, curves = part.outcomes, part.curves
    known = {outcome.variant for outcome in outcomes if outcome.loss is not None}
    first, *others = part.rows
    laws = tuple(_fit_law(outcomes, variant, num_draws=num_draws, seed=seed) for variant in part.rows)
    if first not in known:
        reason = f"{first}, the baseline, has no finished run, so nothing is compared with it."
        return SliceAnalysis(part, laws, (), (reason,))
    candidates = [variant for variant in others if variant in known]
    comparisons = compare_variants(
        outcomes, curves, baseline=first, candidates=candidates, num_draws=num_draws, seed=seed
    )
    remarks = tuple(f"{variant} has no finished run." for variant in others if variant not in known)
    return SliceAnalysis(part, laws, comparisons, remarks)


def _fit_law(outcomes: Sequence[Outcome], variant: str, *, num_draws: int, seed: int) -> VariantLaw:
    try:
        points = gather_points(outcomes, variant)
        return VariantLaw(variant, build_fit_report(points, num_draws=num_draws, seed=seed), None)
    except FieldError as error:
        return VariantLaw(variant, None, str(error))


def _outcome(variant: str, row: Row, *, in_turn: bool) -> Outcome:
    seconds = row.training_seconds
    if in_turn and row.step_seconds is not None:
        seconds = row.step_seconds * row.steps
    return Outcome(
        variant=variant,
        size=row.size,
        budget=f"{row.budget:g}",
        seed=row.seed,
        params=row.params,
        tokens=row.tokens,
        flops=row.training_flops,
        seconds=seconds,
        loss=row.loss,
    )


def _curve(variant: str, row: Row) -> LossCurve:
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
