"""A study's table -> report.html, summary.md, report.json and figures, in one folder.

table -> analysis -> [headline, verdicts, gains, laws, figures, runs] -> page and summary
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sas_megatron import __version__
from sas_megatron.config.errors import translate_os_errors
from sas_megatron.io.files import make_folder, write_file
from sas_megatron.scaling.drawing import embed_svg, render
from sas_megatron.scaling.laws.fit_report import report_tree
from sas_megatron.scaling.numbers import MISSING, format_fields, without_infinities
from sas_megatron.scaling.outcomes import Axis
from sas_megatron.scaling.study.analysis import SliceAnalysis, analyze
from sas_megatron.scaling.study.figures import StudyFigure, list_figures
from sas_megatron.scaling.study.grids import (
    Grid,
    exponent_grid,
    gain_grid,
    law_grid,
    run_grid,
    saving_grid,
    verdict_grid,
)
from sas_megatron.scaling.study.table import StudyTable
from sas_megatron.scaling.study_comparison import StudyComparison
from sas_megatron.scaling.verdicts import AxisVerdict, phrase_verdict

TEMPLATE = Path(__file__).with_name("report.html")
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Section:
    """What the page says of one slice."""

    name: str
    verdicts: tuple[str, ...]
    axes: Grid
    gains: Grid | None
    savings: Grid | None
    saving_remarks: tuple[str, ...]
    laws: Grid | None
    exponents: Grid | None
    law_remarks: tuple[str, ...]
    remarks: tuple[str, ...]
    figures: tuple[StudyFigure, ...]
    runs: Grid


def write_study_report(table: StudyTable, folder: Path, *, num_draws: int = 1000) -> Path:
    """Writes the report of a study; returns the page's path.

    Raises:
        FileProblem: the folder cannot be written.
    """
    analyses = analyze(table, num_draws=num_draws)
    sections = [_section(analysis) for analysis in analyses]
    page = _render_page(table, sections)
    summary = _write_markdown(table, sections)
    record = _as_dict(table, analyses)
    with translate_os_errors(folder, problem="cannot be written", remedy="choose another --output"):
        make_folder(folder / "figures")
        for index, section in enumerate(sections):
            for figure in section.figures:
                stem = _figure_stem(index, section, figure)
                for suffix in ("png", "svg"):
                    drawn = render(figure.draw, size=figure.size, file_format=suffix)
                    write_file(folder / "figures" / f"{stem}.{suffix}", drawn)
        write_file(folder / "report.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
        write_file(folder / "summary.md", summary)
        write_file(folder / "report.html", page)
    return folder / "report.html"


def _figure_stem(index: int, section: Section, figure: StudyFigure) -> str:
    return f"{index + 1}_{figure.name}" if section.name else figure.name


def _section(analysis: SliceAnalysis) -> Section:
    return Section(
        name=analysis.slice.name,
        verdicts=tuple(
            text for comparison in analysis.comparisons for text in _verdict_texts(comparison.verdicts)
        ),
        axes=verdict_grid(analysis.comparisons),
        gains=gain_grid(analysis.comparisons),
        savings=saving_grid(analysis.comparisons),
        saving_remarks=_saving_remarks(analysis.comparisons),
        laws=law_grid(analysis),
        exponents=exponent_grid(analysis),
        law_remarks=_law_remarks(analysis),
        remarks=(
            *analysis.remarks,
            *_told_once(
                (comparison.candidate, remark)
                for comparison in analysis.comparisons
                for remark in comparison.remarks
            ),
        ),
        figures=tuple(list_figures(analysis)),
        runs=run_grid(analysis),
    )


def _verdict_texts(verdicts: Sequence[AxisVerdict]) -> list[str]:
    """Each statement once, with all axes that it goes for."""
    axes: dict[str, list[Axis]] = {}
    for verdict in verdicts:
        axes.setdefault(verdict.statement, []).append(verdict.axis)
    return [phrase_verdict(shared, statement) for statement, shared in axes.items()]


def _told_once(remarks: Iterable[tuple[str, str]]) -> list[str]:
    """Remarks on variants, each once, after the names of all that it goes for."""
    named: dict[str, list[str]] = {}
    for variant, remark in remarks:
        named.setdefault(remark, []).append(variant)
    return [f"{', '.join(variants)}: {remark}" for remark, variants in named.items()]


def _saving_remarks(comparisons: Sequence[StudyComparison]) -> tuple[str, ...]:
    """What goes for the table of savings, each told once for all sizes and budgets that it goes for."""
    told: dict[str, None] = {}
    for saving in (saving for comparison in comparisons for saving in comparison.savings):
        told |= dict.fromkeys(saving.remarks)
        if saving.reason is not None and not saving.is_comparable:
            told[f"{saving.candidate}, size {saving.size}, budget {saving.budget}: {saving.reason}."] = None
    return tuple(told)


def _law_remarks(analysis: SliceAnalysis) -> tuple[str, ...]:
    told = _told_once((law.variant, f"no law ({law.reason}).") for law in analysis.laws if law.report is None)
    told += _told_once(
        (law.variant, remark)
        for law in analysis.laws
        if law.report is not None
        for remark in law.report.remarks
    )
    for comparison in analysis.comparisons:
        if comparison.irreducible is not None:
            told.append(f"{comparison.candidate} and {comparison.baseline}: {comparison.irreducible.text}")
    return tuple(told)


def _about(table: StudyTable) -> list[tuple[str, str]]:
    done = sum(row.status == "done" for row in table.rows)
    machines = dict.fromkeys(row.machine for row in table.rows if row.machine is not None)
    revisions = dict.fromkeys(row.git for row in table.rows if row.git is not None)
    timed = all(row.step_seconds is not None for row in table.rows)
    return [
        ("Runs", f"{done} of {len(table.rows)} finished"),
        ("Collected", table.collected_at),
        ("Verdicts", "at 95 % for all variants of an axis together (Holm's method); intervals of each alone"),
        ("Machine", "; ".join(map(_describe_machine, machines)) or MISSING),
        ("Package", f"{__version__}, {'; '.join(revisions) or MISSING}"),
        (
            "Seconds",
            "steps × seconds of a step, measured in turn with all others (study time)"
            if timed
            else "of each run's own training",
        ),
        (
            "FLOPs",
            "counted by term, attention in full (S², not the causal half), looking up embeddings free; 6ND "
            "beside",
        ),
    ]


def _describe_machine(record: str) -> str:
    """What run.json has of a machine, which the table holds as JSON, in words."""
    try:
        machine = json.loads(record)
    except ValueError:
        return record
    return format_fields(machine)


def _render_page(table: StudyTable, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def draw(section: int, figure: StudyFigure) -> Markup:
        svg = render(figure.draw, size=figure.size, file_format="svg").decode()
        # The only markup that is not escaped by the template: the SVG writer escapes its texts.
        return Markup(embed_svg(svg, prefix=f"{section}-{figure.name}-"))

    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        table=table,
        variants=list(dict.fromkeys(row.variant for row in table.rows)),
        sections=sections,
        about=_about(table),
        draw=draw,
        version=__version__,
        written_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M %Z}",
    )


def _write_markdown(table: StudyTable, sections: Sequence[Section]) -> str:
    parts = [f"# {table.name}: variants against {table.baseline}\n"]
    parts += [f"- {name}: {text}" for name, text in _about(table)]
    parts += [f"- {remark}" for remark in table.remarks]
    for index, section in enumerate(sections):
        parts.append(f"\n## {section.name or 'Verdicts'}\n")
        parts.append(_markdown_grid(section.axes))
        parts += [f"- {text}" for text in (*section.verdicts, *section.remarks)]
        for title, grid in (
            ("Compute- and time-equivalent gain", section.gains),
            ("L(N, D) = E + A/N^α + B/D^β, with 95 % by bootstrap", section.laws),
            ("Powers of compute", section.exponents),
        ):
            if grid is not None:
                parts.append(f"\n### {title}\n\n{_markdown_grid(grid)}")
        parts += [f"- {text}" for text in section.law_remarks]
        if section.savings is not None:
            parts.append(f"\n### Steps saved\n\n{_markdown_grid(section.savings)}")
            parts += [f"- {text}" for text in section.saving_remarks]
        parts.append("")
        parts += [
            f"![{figure.title}](figures/{_figure_stem(index, section, figure)}.png)\n"
            for figure in section.figures
        ]
    return "\n".join(parts) + "\n"


def _markdown_grid(grid: Grid) -> str:
    lines = [grid.headings, ("---",) * len(grid.headings), *grid.lines]
    cells = [[cell.replace("\n", "<br>").replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def _as_dict(table: StudyTable, analyses: Sequence[SliceAnalysis]) -> dict[str, Any]:
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
                    law.variant: {"reason": law.reason} if law.report is None else report_tree(law.report)
                    for law in analysis.laws
                },
                "comparisons": [
                    without_infinities(dataclasses.asdict(comparison)) for comparison in analysis.comparisons
                ],
                "remarks": analysis.remarks,
            }
            for analysis in analyses
        ],
    }
