"""Analysis of a study's table: laws of all variants and their comparison with the baseline, in each slice.

A slice is one level of every axis that all variants have, for example a sequence length. Losses of different
slices are not compared. A level of an axis that only some variants have becomes part of the variant's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.comparison import Comparison, compare_variants
from sas_megatron.scaling.laws.law_fit import LawFit, fit_law
from sas_megatron.scaling.outcomes import LossCurve, Outcome, gather_points
from sas_megatron.scaling.study.study_table import Row, StudyTable


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
        return [
            _build_outcome(variant, row, has_step_times=self.has_step_times)
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
    """The law of one variant. If it could not be fitted, `fit` is None and `reason` states why."""

    variant: str
    fit: LawFit | None
    reason: str | None


@dataclass(frozen=True)
class SliceAnalysis:
    """The results of one slice."""

    slice: Slice
    laws: tuple[VariantLaw, ...]
    comparisons: tuple[Comparison, ...]
    remarks: tuple[str, ...]


def analyze(table: StudyTable, *, num_draws: int = 1000, seed: int = 1) -> tuple[SliceAnalysis, ...]:
    """Fit laws and compare variants; remarks name the results for which the runs are insufficient.

    Args:
        table: The collected table.
        num_draws: Bootstrap draws.
        seed: Seed of the bootstrap.
    """
    return tuple(_analyze_slice(part, num_draws=num_draws, seed=seed) for part in cut_slices(table))


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


def _analyze_slice(part: Slice, *, num_draws: int, seed: int) -> SliceAnalysis:
    outcomes, curves = part.outcomes, part.curves
    known = {outcome.variant for outcome in outcomes if outcome.loss is not None}
    first, *others = part.rows
    laws = tuple(_fit_law(outcomes, variant, num_draws=num_draws, seed=seed) for variant in part.rows)
    if first not in known:
        reason = f"The baseline {first} has no finished run: no variant can be compared."
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
        return VariantLaw(variant, fit_law(points, num_draws=num_draws, seed=seed), None)
    except FieldError as error:
        return VariantLaw(variant, None, str(error))


def _build_outcome(variant: str, row: Row, *, has_step_times: bool) -> Outcome:
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
        seconds=seconds,
        loss=row.loss,
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
