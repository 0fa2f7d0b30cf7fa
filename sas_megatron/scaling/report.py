"""Runs -> comparison.json, comparison.png and comparison.html in one directory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sas_megatron.config.errors import translate_os_errors
from sas_megatron.io.files import make_folder, write_files
from sas_megatron.scaling.comparison import AXES, Comparison, compare_runs
from sas_megatron.scaling.figure import draw_png
from sas_megatron.scaling.page import describe_subject, render_page
from sas_megatron.scaling.runs import Run

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ReportFiles:
    """Where a report lies, and what it says."""

    json: Path
    png: Path
    html: Path
    comparison: Comparison


def write_report(runs: Sequence[Run], output_directory: str | Path) -> ReportFiles:
    """Compares `runs`, the first being the baseline, and writes it for programs, for talks and to read.

    Raises:
        UserError: the runs cannot be compared, or the directory cannot be written.
    """
    comparison = compare_runs(runs)
    title = describe_subject(runs)
    directory = Path(output_directory)
    files = ReportFiles(
        json=directory / "comparison.json",
        png=directory / "comparison.png",
        html=directory / "comparison.html",
        comparison=comparison,
    )
    # Everything is made before anything is written.
    contents = {
        files.json: to_json(comparison).encode(),
        files.png: draw_png(runs, comparison.verdicts, title=title),
        files.html: render_page(runs, comparison, title=title, written_at=datetime.now(UTC)).encode(),
    }
    with translate_os_errors(directory, problem="cannot be written", remedy="choose another directory"):
        make_folder(directory)
        write_files(contents)
    return files


def to_json(comparison: Comparison) -> str:
    """The comparison for programs; missing numbers are null."""
    budgets = {
        axis: {verdict.candidate: verdict.budget for verdict in comparison.verdicts if verdict.axis == axis}
        for axis in AXES
    }
    tree = {
        "format_version": FORMAT_VERSION,
        "baseline": comparison.rows[0].name,
        "budgets": budgets,
        **dataclasses.asdict(comparison),
    }
    return json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
