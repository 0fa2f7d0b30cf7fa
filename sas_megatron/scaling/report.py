"""Writer of reports: one HTML page, a JSON record, an optional Markdown summary, and figures.

Comparisons of a few runs (`run_report`) and of a study (`study.study_report`) build a `Report`; this module
writes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sas_megatron import __version__
from sas_megatron.config.errors import translate_os_errors
from sas_megatron.io.files import make_folder, write_files
from sas_megatron.scaling.drawing import FileFormat, embed_svg, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Grid:
    """A table of texts; the first column names the row. A cell may have several lines."""

    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    # CSS class of the table: verdict, runs, texts or total.
    style: str = ""


@dataclass(frozen=True)
class ReportFigure:
    """A figure that is drawn on demand; `text` describes it for readers who cannot see it."""

    name: str
    title: str
    text: str
    size: tuple[float, float]
    draw: Callable[[Figure], None]


@dataclass(frozen=True)
class Block:
    """A part of a section, each field optional: heading, explanation, table, list, figure, shell commands."""

    title: str = ""
    note: str = ""
    grid: Grid | None = None
    texts: tuple[str, ...] = ()
    figure: ReportFigure | None = None
    commands: tuple[str, ...] = ()
    # Whether the Markdown summary contains the block.
    in_summary: bool = True


@dataclass(frozen=True)
class Section:
    """Blocks under one heading."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """The contents of a report; `record` is written as JSON."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]
    record: dict[str, Any]
    # What the report opens with: an answer of a few sentences and a figure.
    answer: tuple[str, ...] = ()
    figure: ReportFigure | None = None
    about: tuple[tuple[str, str], ...] = ()
    remarks: tuple[str, ...] = ()
    footer: str = ""


@dataclass(frozen=True)
class ReportFiles:
    """File names of a report in its folder; `figures` contain {name} for the name of a figure."""

    page: str
    record: str
    summary: str | None = None
    figures: tuple[str, ...] = field(default=("figures/{name}.png", "figures/{name}.svg"))


def write_report(report: Report, folder: str | Path, files: ReportFiles) -> Path:
    """Write a report and return the path of its page.

    All contents are prepared before the first file is replaced, so that a failure leaves an earlier report
    unchanged. Other files in the folder are kept.

    Raises:
        FileProblem: The folder cannot be written.
    """
    folder = Path(folder)
    contents: dict[Path, bytes] = {folder / files.page: render_page(report).encode()}
    record = json.dumps(report.record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    contents[folder / files.record] = record.encode()
    if files.summary is not None:
        contents[folder / files.summary] = render_markdown(report, files).encode()
    for figure in _list_figures(report):
        for name in files.figures:
            file_format: FileFormat = "png" if name.endswith(".png") else "svg"
            drawing = render(figure.draw, size=figure.size, file_format=file_format)
            contents[folder / name.format(name=figure.name)] = drawing
    with translate_os_errors(folder, problem="cannot be written", remedy="choose another folder"):
        for parent in {path.parent for path in contents}:
            make_folder(parent)
        write_files(contents)
    return folder / files.page


def render_page(report: Report, *, written_at: datetime | None = None) -> str:
    """Return the report as one HTML page without external resources."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def draw(figure: ReportFigure) -> Markup:
        svg = render(figure.draw, size=figure.size, file_format="svg").decode()
        # The only markup that the template does not escape: the SVG writer escapes its texts.
        return Markup(embed_svg(svg, prefix=f"{figure.name}-"))

    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        draw=draw,
        version=__version__,
        written_at=f"{written_at or datetime.now(UTC):%Y-%m-%d %H:%M %Z}",
    )


def render_markdown(report: Report, files: ReportFiles) -> str:
    """Return the report as Markdown with links to its figures."""
    parts = [f"# {report.title}\n"]
    if report.answer:
        parts.append(" ".join(report.answer) + "\n")
    if report.figure is not None:
        parts.append(_link_figure(report.figure, files))
    for section in report.sections:
        parts.append(f"\n## {section.title}\n")
        for block in section.blocks:
            if not block.in_summary:
                continue
            if block.figure is not None:
                parts.append(_link_figure(block.figure, files))
                continue
            if block.title:
                parts.append(f"\n### {block.title}\n")
            if block.note:
                parts.append(f"{block.note}\n")
            if block.grid is not None:
                parts.append(_render_markdown_grid(block.grid))
            parts += [f"- {text}" for text in block.texts]
    if report.about or report.remarks:
        parts.append("\n## About\n")
        parts += [f"- {name}: {text}" for name, text in report.about]
        parts += [f"- {remark}" for remark in report.remarks]
    return "\n".join(parts) + "\n"


def _link_figure(figure: ReportFigure, files: ReportFiles) -> str:
    return f"![{figure.title}]({files.figures[0].format(name=figure.name)})\n"


def _list_figures(report: Report) -> list[ReportFigure]:
    blocks = [block for section in report.sections for block in section.blocks]
    return [figure for figure in (report.figure, *(block.figure for block in blocks)) if figure is not None]


def _render_markdown_grid(grid: Grid) -> str:
    lines = [grid.headings, ("---",) * len(grid.headings), *grid.lines]
    cells = [[cell.replace("\n", "<br>").replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"
