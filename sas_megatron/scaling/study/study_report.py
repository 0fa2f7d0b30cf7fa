"""Report of a study: collected table -> analysis of each slice -> verdicts, gains, laws, figures, runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sas_megatron import __version__
from sas_megatron.scaling.comparison import Comparison
from sas_megatron.scaling.laws.law_record import law_fit_record
from sas_megatron.scaling.numbers import MISSING, replace_non_finite
from sas_megatron.scaling.outcomes import AXIS_NAMES
from sas_megatron.scaling.report import Block, Grid, Report, ReportFiles, Section, write_report
from sas_megatron.scaling.study.analysis import SliceAnalysis, analyze
from sas_megatron.scaling.study.answer import answer_study
from sas_megatron.scaling.study.evidence_figures import difference_figure
from sas_megatron.scaling.study.figures import list_figures
from sas_megatron.scaling.study.grids import (
    describe_machine,
    difference_grid,
    exponent_grid,
    gain_grid,
    group_axes,
    law_grid,
    machine_grid,
    name_axes,
    rate_grid,
    run_grid,
    saving_grid,
    trend_grid,
    verdict_grid,
)
from sas_megatron.scaling.study.mechanisms import choose_runs, list_mechanism_blocks
from sas_megatron.scaling.study.study_table import StudyTable

# Version 3 had other names of a verdict's estimates and of gains.
FORMAT_VERSION = 4
FILES = ReportFiles("report.html", "report.json", "summary.md")

VERDICT_NOTE = (
    "Loss of the variant minus that of {baseline}: the mean over sizes and budgets, weighted by 1 / "
    "variance of a run at that budget, with its 95 % interval, the p-value after Holm's correction for all "
    "variants of a column, and the degrees of freedom (df). Lower is better. A variant wins or loses if p "
    "< 0.05; otherwise the seeds of each variant are stated with which a difference of this size is found "
    "with a power of 80 %. Seeds are the repetitions, since a seed has the same data order at all sizes "
    "and budgets. Their variance is pooled over the variants. A variant with one seed is compared with the "
    "mean over the seeds of {baseline}. FLOPs are compared with all S² pairs of tokens, and with the "
    "causal half."
)
DIFFERENCE_NOTE = (
    "Loss of the variant minus that of {baseline} at {axes}, by size and budget. The last line is the "
    "standard deviation of a run over seeds, pooled over variants and sizes and smoothed over budgets."
)
TREND_NOTE = (
    "Slope of the differences over the logarithm of the amount, with the weights of the verdicts, its 95 % "
    "interval, the p-value of a single test, and the degrees of freedom. Negative: the variant gains on "
    "{baseline} as both spend more. At equal FLOPs it follows the best sizes where the trained sizes enclose "
    "them, and the same sizes elsewhere."
)
GAIN_NOTE = (
    "The budget that {baseline} would need for the same loss, as a multiple of the variant's budget, with "
    "95 % intervals from the noise between seeds. Above 1 the variant is worth its cost. Nothing is "
    "extrapolated beyond the measured budgets."
)
LAW_NOTE = (
    "Fitted by the sum of Huber losses of log residuals; second line: 95 % interval by bootstrap over the "
    "sizes and seeds, which are drawn with all of their budgets."
)
RATE_NOTE = (
    "Difference of the losses in the learning rate sweeps (one seed), at the best swept "
    "rates and with the next lower or higher rate for the variant or for {baseline}. A verdict is fragile if "
    "the sign changes."
)
SAVING_NOTE = "Share of the baseline's steps that a variant does not need to reach the baseline's final loss."
MACHINE_NOTE = (
    "Which machine and which commit of the package made which runs. Seconds are comparable on one machine."
)
RUN_NOTE = "A dash is a missing value. The last column is the beginning of the SHA-256 checksum of run.json."


def write_study_report(table: StudyTable, folder: Path, *, num_draws: int = 1000) -> Path:
    """Write the report of a study and return the path of its page.

    Raises:
        FileProblem: The folder cannot be written.
    """
    return write_report(build_study_report(table, num_draws=num_draws), folder, FILES)


def build_study_report(table: StudyTable, *, num_draws: int = 1000) -> Report:
    """Analyze the collected table of a study, with `num_draws` bootstrap draws of the laws."""
    analyses = analyze(table, num_draws=num_draws)
    variants = list(dict.fromkeys(row.variant for row in table.rows))
    return Report(
        title=f"{table.name}: {', '.join(variants[1:])} against {table.baseline}",
        subtitle="",
        answer=answer_study(table, analyses),
        figure=difference_figure(analyses),
        sections=(
            *(_build_section(analysis, index, table=table) for index, analysis in enumerate(analyses)),
            *_build_mechanism_sections(analyses),
        ),
        record=_study_record(table, analyses),
        about=_describe_study(table),
        remarks=table.remarks,
        footer="Every number is measured or counted.",
    )


def _build_section(analysis: SliceAnalysis, index: int, *, table: StudyTable) -> Section:
    comparisons, baseline = analysis.comparisons, table.baseline
    name = analysis.slice.name
    blocks = _list_verdict_blocks(analysis, table, is_first=index == 0)
    blocks += _grid_block(
        "Compute- and time-equivalent gain", GAIN_NOTE.format(baseline=baseline), gain_grid(comparisons)
    )
    blocks += _grid_block("L(N, D) = E + A/N^α + B/D^β", LAW_NOTE, law_grid(analysis))
    blocks += _grid_block(
        "Powers of compute, and prediction of the largest runs", "", exponent_grid(analysis)
    )
    blocks.append(Block(texts=_list_law_remarks(analysis)))
    if index == 0:
        blocks += _grid_block("Learning rates", RATE_NOTE.format(baseline=baseline), rate_grid(table))
    for figure in list_figures(analysis, table.sweeps if index == 0 else ()):
        named = dataclasses.replace(figure, name=f"{index + 1}_{figure.name}") if name else figure
        blocks.append(Block(title=figure.title, figure=named))
    saved = saving_grid(comparisons)
    if saved is not None:
        blocks.append(Block("Steps saved", SAVING_NOTE, saved, _list_saving_remarks(comparisons)))
    blocks.append(Block("Runs", RUN_NOTE, run_grid(analysis), in_summary=False))
    if index == 0:
        blocks += _grid_block("Machines", MACHINE_NOTE, machine_grid(table))
    return Section(name or "Verdicts", tuple(blocks))


def _build_mechanism_sections(analyses: Sequence[SliceAnalysis]) -> list[Section]:
    """Return for each slice with measurements a section on what happens inside its models."""
    sections = []
    for index, analysis in enumerate(analyses, 1):
        runs, name = choose_runs(analysis.slice.rows), analysis.slice.name
        if runs:
            blocks = list_mechanism_blocks(runs, name=f"{index}_mechanisms" if name else "mechanisms")
            sections.append(Section(": ".join(filter(None, ("Inside the models", name))), blocks))
    return sections


def _list_verdict_blocks(analysis: SliceAnalysis, table: StudyTable, *, is_first: bool) -> list[Block]:
    """Return the verdicts in a table and in words, and the differences by size and budget."""
    comparisons, noise = analysis.comparisons, analysis.noise
    remarks = _merge_remarks(
        (comparison.candidate, remark) for comparison in comparisons for remark in comparison.remarks
    )
    if not comparisons or noise is None:
        return [Block(texts=(*analysis.remarks, *remarks))]
    groups = group_axes(comparisons)
    withdrawn = [name for name in table.withdrawn if name in analysis.slice.rows]
    outliers = tuple(
        f"Outlier: {outlier.variant}, size {outlier.cell[0]}, budget {outlier.cell[1]}, seed {outlier.seed} "
        f"is {abs(outlier.deviations):.1f} deviations from the other seeds of its cell."
        for outlier in analysis.outliers
    )
    blocks = [
        Block(
            note=VERDICT_NOTE.format(baseline=table.baseline) if is_first else "",
            grid=verdict_grid(comparisons, groups, withdrawn),
        ),
        Block("Limits", texts=(*analysis.remarks, *_list_reservations(comparisons), *remarks, *outliers)),
    ]
    for number, axes in enumerate(groups):
        grid = difference_grid(comparisons, axes[0], noise)
        note = DIFFERENCE_NOTE.format(baseline=table.baseline, axes=name_axes(axes))
        title = f"Differences at {name_axes(axes)}"
        if grid is not None:
            blocks.append(
                Block(title, note if is_first and number == 0 else "", grid, in_summary=number == 0)
            )
    blocks += _grid_block(
        "Change of the difference with the budget",
        TREND_NOTE.format(baseline=table.baseline) if is_first else "",
        trend_grid(comparisons, noise),
    )
    return blocks


def _list_reservations(comparisons: Sequence[Comparison]) -> list[str]:
    """Return each reservation once, after the variants and axes that it applies to."""
    named: dict[str, dict[str, list[str]]] = {}
    for comparison in comparisons:
        for verdict in comparison.verdicts:
            for text in verdict.reservations:
                axes = named.setdefault(text, {}).setdefault(AXIS_NAMES[verdict.axis], [])
                axes.append(comparison.candidate)
            if verdict.estimate is None:
                text = "not compared, since no runs of the baseline enclose the runs of the variant."
                named.setdefault(text, {}).setdefault(AXIS_NAMES[verdict.axis], []).append(
                    comparison.candidate
                )
    lines = []
    for text, by_axis in named.items():
        by_names: dict[str, list[str]] = {}
        for axis, names in by_axis.items():
            by_names.setdefault(", ".join(dict.fromkeys(names)), []).append(axis)
        where = "; ".join(f"{names} at equal {', '.join(axes)}" for names, axes in by_names.items())
        lines.append(f"{where}: {text}")
    return lines


def _grid_block(title: str, note: str, grid: Grid | None) -> list[Block]:
    return [] if grid is None else [Block(title, note, grid)]


def _merge_remarks(remarks: Iterable[tuple[str, str]]) -> list[str]:
    """Return each remark once, after the names of all variants that it applies to."""
    named: dict[str, list[str]] = {}
    for variant, remark in remarks:
        named.setdefault(remark, []).append(variant)
    return [f"{', '.join(variants)}: {remark}" for remark, variants in named.items()]


def _list_saving_remarks(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    """Return the remarks on the table of savings, each once for all sizes and budgets."""
    remarks: dict[str, None] = {}
    for saving in (saving for comparison in comparisons for saving in comparison.savings):
        remarks |= dict.fromkeys(saving.remarks)
        if saving.reason is not None and not saving.is_comparable:
            remarks[f"{saving.candidate}, size {saving.size}, budget {saving.budget}: {saving.reason}."] = (
                None
            )
    return tuple(remarks)


def _list_law_remarks(analysis: SliceAnalysis) -> tuple[str, ...]:
    remarks = _merge_remarks(
        (law.variant, f"no law ({law.reason}).") for law in analysis.laws if law.fit is None
    )
    remarks += _merge_remarks(
        (law.variant, remark) for law in analysis.laws if law.fit is not None for remark in law.fit.remarks
    )
    return tuple(remarks)


def _describe_study(table: StudyTable) -> tuple[tuple[str, str], ...]:
    done = sum(row.status == "done" for row in table.rows)
    machines = dict.fromkeys(row.machine for row in table.rows if row.machine is not None)
    revisions = dict.fromkeys(row.git for row in table.rows if row.git is not None)
    is_timed = all(row.step_seconds is not None for row in table.rows)
    return (
        ("Runs", f"{done} of {len(table.rows)} finished"),
        ("Collected", table.collected_at),
        ("Machine", "; ".join(map(describe_machine, machines)) or MISSING),
        ("Package", f"{__version__}, {'; '.join(revisions) or MISSING}"),
        (
            "Seconds",
            "steps × seconds per step, measured in alternation with all other cells (study time)"
            if is_timed
            else "training time of each run",
        ),
        (
            "FLOPs",
            "counted by term, without embedding look-ups; with all S² pairs of tokens where the causal "
            "half is not named; 6ND in a separate column",
        ),
    )


def _study_record(table: StudyTable, analyses: Sequence[SliceAnalysis]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "study": table.name,
        "baseline": table.baseline,
        "collected_at": table.collected_at,
        "remarks": table.remarks,
        "slices": [
            {
                "name": analysis.slice.name,
                "laws": {
                    law.variant: {"reason": law.reason} if law.fit is None else law_fit_record(law.fit)
                    for law in analysis.laws
                },
                "comparisons": [_comparison_record(comparison) for comparison in analysis.comparisons],
                "remarks": analysis.remarks,
            }
            for analysis in analyses
        ],
    }


def _comparison_record(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as JSON values, without the weights of cells."""
    record: dict[str, Any] = replace_non_finite(dataclasses.asdict(comparison))
    for verdict in record["verdicts"]:
        for cell in verdict["cells"]:
            del cell["weights"]
    return record
