"""Report of a study: collected table -> analysis of each slice -> verdicts, gains, laws, figures, runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sas_megatron import __version__
from sas_megatron.scaling.comparison import Comparison
from sas_megatron.scaling.laws.law_record import law_fit_record
from sas_megatron.scaling.numbers import MISSING, format_fields, replace_non_finite
from sas_megatron.scaling.outcomes import Axis
from sas_megatron.scaling.report import Block, Grid, Report, ReportFiles, Section, write_report
from sas_megatron.scaling.study.analysis import SliceAnalysis, analyze
from sas_megatron.scaling.study.figures import list_figures
from sas_megatron.scaling.study.grids import (
    exponent_grid,
    gain_grid,
    law_grid,
    run_grid,
    saving_grid,
    verdict_grid,
)
from sas_megatron.scaling.study.study_table import StudyTable
from sas_megatron.scaling.verdicts import Verdict, phrase_verdict

# Version 2 had other names of a verdict's fields and of its result.
FORMAT_VERSION = 3
FILES = ReportFiles("report.html", "report.json", "summary.md")

VERDICT_NOTE = (
    "Loss of the variant minus that of {baseline}: the mean over sizes, budgets and seeds that can be "
    "compared, with the 95 % interval of each variant alone. Lower is better. A variant wins if the "
    "difference is negative and significant at 95 % among all comparisons on its axis (Holm's method). "
    "Budgets of one seed share most of their steps and count once."
)
GAIN_NOTE = (
    "The budget that {baseline} would need for the same loss, as a multiple of the variant's budget, with "
    "95 % bootstrap intervals over runs. Above 1 the variant is worth its cost. Nothing is extrapolated "
    "beyond the measured budgets. The bootstrap draws runs independently, so that intervals are too narrow "
    "if the branches of one trunk have correlated errors."
)
LAW_NOTE = (
    "Fitted by the sum of Huber losses of log residuals; second line: 95 % interval by bootstrap over runs, "
    "which are drawn independently."
)
SAVING_NOTE = "Share of the baseline's steps that a variant does not need to reach the baseline's final loss."
RUN_NOTE = "A dash is a missing value. The last column is the beginning of the SHA-256 checksum of run.json."


def write_study_report(table: StudyTable, folder: Path, *, num_draws: int = 1000) -> Path:
    """Write the report of a study and return the path of its page.

    Raises:
        FileProblem: The folder cannot be written.
    """
    return write_report(build_study_report(table, num_draws=num_draws), folder, FILES)


def build_study_report(table: StudyTable, *, num_draws: int = 1000) -> Report:
    """Analyze the collected table of a study, with `num_draws` bootstrap draws."""
    analyses = analyze(table, num_draws=num_draws)
    variants = list(dict.fromkeys(row.variant for row in table.rows))
    return Report(
        title=f"{table.name}: {', '.join(variants[1:])} against {table.baseline}",
        subtitle="",
        sections=tuple(
            _build_section(analysis, index, baseline=table.baseline)
            for index, analysis in enumerate(analyses)
        ),
        record=_study_record(table, analyses),
        about=_describe_study(table),
        remarks=table.remarks,
        footer="Every number is measured or counted.",
    )


def _build_section(analysis: SliceAnalysis, index: int, *, baseline: str) -> Section:
    comparisons = analysis.comparisons
    name = analysis.slice.name
    verdicts = [text for comparison in comparisons for text in _list_verdicts(comparison.verdicts)]
    remarks = _merge_remarks(
        (comparison.candidate, remark) for comparison in comparisons for remark in comparison.remarks
    )
    blocks = [Block(texts=(*analysis.remarks, *remarks))]
    if comparisons:
        note = VERDICT_NOTE.format(baseline=baseline)
        blocks.insert(0, Block(note=note, grid=verdict_grid(comparisons), texts=tuple(verdicts)))
    gain_note = GAIN_NOTE.format(baseline=baseline)
    blocks += _grid_block("Compute- and time-equivalent gain", gain_note, gain_grid(comparisons))
    blocks += _grid_block("L(N, D) = E + A/N^α + B/D^β", LAW_NOTE, law_grid(analysis))
    blocks += _grid_block(
        "Powers of compute, and prediction of the largest runs", "", exponent_grid(analysis)
    )
    blocks.append(Block(texts=_list_law_remarks(analysis)))
    for figure in list_figures(analysis):
        named = dataclasses.replace(figure, name=f"{index + 1}_{figure.name}") if name else figure
        blocks.append(Block(title=figure.title, figure=named))
    saved = saving_grid(comparisons)
    if saved is not None:
        blocks.append(Block("Steps saved", SAVING_NOTE, saved, _list_saving_remarks(comparisons)))
    blocks.append(Block("Runs", RUN_NOTE, run_grid(analysis), in_summary=False))
    return Section(name or "Verdicts", tuple(blocks))


def _grid_block(title: str, note: str, grid: Grid | None) -> list[Block]:
    return [] if grid is None else [Block(title, note, grid)]


def _list_verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    """Return each statement once, with all axes on which it holds."""
    axes: dict[str, list[Axis]] = {}
    for verdict in verdicts:
        axes.setdefault(verdict.statement, []).append(verdict.axis)
    return [phrase_verdict(shared, statement) for statement, shared in axes.items()]


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
    for comparison in analysis.comparisons:
        if comparison.irreducible is not None:
            remarks.append(f"{comparison.candidate} and {comparison.baseline}: {comparison.irreducible.text}")
    return tuple(remarks)


def _describe_study(table: StudyTable) -> tuple[tuple[str, str], ...]:
    done = sum(row.status == "done" for row in table.rows)
    machines = dict.fromkeys(row.machine for row in table.rows if row.machine is not None)
    revisions = dict.fromkeys(row.git for row in table.rows if row.git is not None)
    is_timed = all(row.step_seconds is not None for row in table.rows)
    return (
        ("Runs", f"{done} of {len(table.rows)} finished"),
        ("Collected", table.collected_at),
        (
            "Verdicts",
            "at 95 % for all variants of an axis together (Holm's method); intervals for each variant alone",
        ),
        ("Machine", "; ".join(map(_describe_machine, machines)) or MISSING),
        ("Package", f"{__version__}, {'; '.join(revisions) or MISSING}"),
        (
            "Seconds",
            "steps × seconds per step, measured in alternation with all other cells (study time)"
            if is_timed
            else "training time of each run",
        ),
        (
            "FLOPs",
            "counted by term, with full attention (S², not the causal half) and without embedding look-ups; "
            "6ND in a separate column",
        ),
    )


def _describe_machine(record: str) -> str:
    """Return the machine of run.json, a JSON text in the table, in words."""
    try:
        machine = json.loads(record)
    except ValueError:
        return record
    return format_fields(machine)


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
                "comparisons": [
                    replace_non_finite(dataclasses.asdict(comparison)) for comparison in analysis.comparisons
                ],
                "remarks": analysis.remarks,
            }
            for analysis in analyses
        ],
    }
