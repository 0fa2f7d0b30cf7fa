"""Comparison of a few finished runs, the first being the baseline: costs, final losses and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sas_megatron.data.epochs import describe_repetition
from sas_megatron.scaling.comparison import Comparison
from sas_megatron.scaling.curve_verdicts import CURVE_AXES, judge_curves
from sas_megatron.scaling.matching import TOLERANCE
from sas_megatron.scaling.numbers import format_share
from sas_megatron.scaling.runs import Run, check_comparable
from sas_megatron.scaling.verdicts import Verdict

ONE_SEED = (
    "Each variant was trained with one seed. Another seed would change every loss by an amount that these "
    "runs cannot estimate: a small difference may be noise. Repeat with more seeds before relying on it."
)
LINEAR_INTERPOLATION = (
    "Losses between two evaluations are interpolated linearly. Loss curves are convex, so an interpolated "
    "loss is too high, the more so the further apart the evaluations are (evaluation.interval)."
)


@dataclass(frozen=True)
class RunMeasures:
    """Costs and results of one run, with ratios and differences to the baseline; None if missing."""

    name: str
    attention: str
    ffn_hidden_size: int
    parameters: int | None
    parameters_ratio: float | None
    training_flops_per_token: float | None
    training_flops_per_token_ratio: float | None
    median_step_seconds: float | None
    median_step_seconds_ratio: float | None
    tokens_per_second: float | None
    training_seconds: float | None
    peak_memory_bytes: int | None
    final_validation_loss: float | None
    final_validation_loss_difference: float | None
    validation_perplexity: float | None
    validation_bits_per_byte: float | None


@dataclass(frozen=True)
class RunComparison:
    """The measures of each run, each candidate against the first run, and remarks on their limits."""

    rows: tuple[RunMeasures, ...]
    comparisons: tuple[Comparison, ...]
    remarks: tuple[str, ...]

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The verdicts of all candidates, ordered by axis."""
        by_axis = zip(*(comparison.verdicts for comparison in self.comparisons), strict=True)
        return tuple(verdict for verdicts in by_axis for verdict in verdicts)


def compare_runs(runs: Sequence[Run]) -> RunComparison:
    """Compare two or more runs; the first is the baseline.

    Raises:
        UserError: The runs differ in settings other than the attention and the MLP width.
    """
    check_comparable(runs)
    baseline, *candidates = runs
    rows = tuple(measure_run(run, baseline) for run in runs)
    comparisons = tuple(
        Comparison(
            baseline=baseline.name,
            candidate=candidate.name,
            verdicts=tuple(judge_curves(baseline, candidate, axis) for axis in CURVE_AXES),
        )
        for candidate in candidates
    )
    return RunComparison(rows, comparisons, _list_remarks(runs, rows, comparisons))


def measure_run(run: Run, baseline: Run) -> RunMeasures:
    """Return the measures of a run; `tokens_per_second` is the mean over its training time."""
    summary, base = run.summary, baseline.summary
    parameters, flops = sum_terms(summary.parameters), sum_terms(summary.training_flops_per_token)
    loss, base_loss = summary.final_validation_loss, base.final_validation_loss
    return RunMeasures(
        name=run.name,
        attention=run.config.attention.kind,
        ffn_hidden_size=run.config.model.ffn_hidden_size,
        parameters=None if parameters is None else int(parameters),
        parameters_ratio=_ratio(parameters, sum_terms(base.parameters)),
        training_flops_per_token=flops,
        training_flops_per_token_ratio=_ratio(flops, sum_terms(base.training_flops_per_token)),
        median_step_seconds=summary.median_step_seconds,
        median_step_seconds_ratio=_ratio(summary.median_step_seconds, base.median_step_seconds),
        tokens_per_second=_ratio(summary.tokens, summary.training_seconds),
        training_seconds=summary.training_seconds,
        peak_memory_bytes=summary.peak_memory_bytes,
        final_validation_loss=loss,
        final_validation_loss_difference=None if loss is None or base_loss is None else loss - base_loss,
        validation_perplexity=summary.validation_perplexity,
        validation_bits_per_byte=summary.validation_bits_per_byte,
    )


def sum_terms(terms: Mapping[str, float] | None) -> float | None:
    """Return the sum of named terms; None if there are none."""
    return sum(terms.values()) if terms else None


def _list_remarks(
    runs: Sequence[Run], rows: Sequence[RunMeasures], comparisons: Sequence[Comparison]
) -> tuple[str, ...]:
    remarks = [remark for run in runs for remark in run.remarks]
    remarks += describe_repetition({run.name: run.summary.epochs for run in runs})
    for row in rows[1:]:
        ratio = row.parameters_ratio
        if ratio is None:
            remarks.append(
                f"The parameter counts of {row.name} and {rows[0].name} are not both recorded, so that their "
                "sizes may differ."
            )
        elif abs(ratio - 1) > TOLERANCE:
            comparative = "more" if ratio > 1 else "fewer"
            remarks.append(
                f"{row.name} has {format_share(abs(ratio - 1))} {comparative} parameters than "
                f"{rows[0].name}; differences of up to {TOLERANCE:.0%} count as matched. Part of a "
                "difference in loss may be due to the size."
            )
    machines = [run.provenance.get("machine") for run in runs]
    if any(machine != machines[0] for machine in machines):
        remarks.append(
            "The runs were trained on different machines: their times, and the verdicts at equal time, are "
            "not comparable."
        )
    readings = [
        reading
        for comparison in comparisons
        for verdict in comparison.verdicts
        for reading in verdict.readings
        if reading is not None
    ]
    if any(reading.steps[0] != reading.steps[1] for reading in readings):
        remarks.append(LINEAR_INTERPOLATION)
    return (*remarks, ONE_SEED)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None
