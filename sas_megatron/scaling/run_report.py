"""Report of a comparison of a few runs: terminal table, page, figure and JSON record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sas_megatron.config.loading import find_differences
from sas_megatron.scaling.curve_verdicts import CURVE_AXES
from sas_megatron.scaling.loss_figure import PANELS, CurveData, draw_loss_curves
from sas_megatron.scaling.numbers import (
    MISSING,
    format_bytes,
    format_count,
    format_difference,
    format_duration,
    format_exact,
    format_loss,
    format_power,
    format_ratio,
    format_share,
)
from sas_megatron.scaling.report import Block, Grid, Report, ReportFigure, ReportFiles, Section
from sas_megatron.scaling.run_comparison import RunComparison, RunMeasures, sum_terms
from sas_megatron.scaling.run_records import CurvePoint
from sas_megatron.scaling.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

# Version 2 had other names of a verdict's estimates. Version 1 had the axes consumed_tokens, training_flops
# and elapsed_seconds, and shorter verdicts.
FORMAT_VERSION = 3
FILES = ReportFiles("comparison.html", "comparison.json", figures=("{name}.png",))

_Format = Callable[[RunMeasures], str]
# Label, value, and relation to the baseline.
_MEASURES: tuple[tuple[str, _Format, _Format | None], ...] = (
    ("Attention", lambda row: row.attention, None),
    ("MLP width", lambda row: format_exact(row.ffn_hidden_size), None),
    ("Parameters", lambda row: format_count(row.parameters), lambda row: format_ratio(row.parameters_ratio)),
    (
        "Training FLOPs per token",
        lambda row: format_power(row.training_flops_per_token),
        lambda row: format_ratio(row.training_flops_per_token_ratio),
    ),
    (
        "Time per step (median)",
        lambda row: format_duration(row.median_step_seconds),
        lambda row: format_ratio(row.median_step_seconds_ratio),
    ),
    ("Tokens per second (mean)", lambda row: format_count(row.tokens_per_second), None),
    ("Training time", lambda row: format_duration(row.training_seconds), None),
    ("Peak memory", lambda row: format_bytes(row.peak_memory_bytes), None),
    (
        "Final validation loss",
        lambda row: format_loss(row.final_validation_loss),
        lambda row: format_difference(row.final_validation_loss_difference),
    ),
    ("Validation perplexity", lambda row: format_count(row.validation_perplexity), None),
    ("Validation bits per byte", lambda row: format_loss(row.validation_bits_per_byte), None),
)


def build_run_report(runs: Sequence[Run], comparison: RunComparison) -> Report:
    """Return the report of runs that were compared with the first of them."""
    names = [run.name for run in runs]
    verdicts = tuple(verdict.text for verdict in comparison.verdicts)
    title = describe_subject(runs)
    figure = ReportFigure(
        "comparison",
        title,
        f"Validation and training loss of {', '.join(names)} against tokens, training FLOPs and training "
        "time. Losses above the frame, early in training, are cut off. A dotted line marks the largest "
        f"budget that a run and the baseline both reached: the verdicts are read there. {' '.join(verdicts)}",
        (12.5, 4.7),
        lambda drawing: _draw(drawing, runs, comparison, title=title),
    )
    terms = (
        ("Parameters", [run.summary.parameters for run in runs]),
        ("Training FLOPs per token", [run.summary.training_flops_per_token for run in runs]),
    )
    sections = (
        Section("Verdicts", (Block(texts=verdicts), Block("Limitations", texts=comparison.remarks))),
        Section("Loss curves", (Block(figure=figure),)),
        Section(
            "Measures",
            (
                Block(
                    note="Second line of a cell: ratio to the baseline, or difference from it. The training "
                    "time excludes start-up, evaluation and checkpoints. Losses are in nats per token. A "
                    "dash is a missing result.",
                    grid=build_measure_grid(comparison.rows),
                ),
                *(
                    Block(
                        f"{title} by term",
                        "Second line of a cell: share of the total.",
                        build_term_grid(names, values),
                    )
                    for title, values in terms
                ),
            ),
        ),
        Section(
            "Provenance",
            (
                Block(
                    note="First the config fields in which the runs differ; all others are equal.",
                    grid=_build_provenance_grid(runs),
                ),
                Block("Commands to train the runs again", commands=tuple(map(describe_command, runs))),
            ),
        ),
    )
    heading = f"{', '.join(names[1:])} against {names[0]}"
    return Report(heading, title, sections, comparison_record(comparison))


def comparison_record(comparison: RunComparison) -> dict[str, Any]:
    """Return the comparison as JSON values; missing numbers are null."""
    verdicts = comparison.verdicts
    return {
        "format_version": FORMAT_VERSION,
        "baseline": comparison.rows[0].name,
        "budgets": {
            axis: {verdict.candidate: verdict.budget for verdict in verdicts if verdict.axis == axis}
            for axis in CURVE_AXES
        },
        "rows": [dataclasses.asdict(row) for row in comparison.rows],
        "verdicts": [
            {
                **dataclasses.asdict(verdict),
                "difference": verdict.difference,
                "lower": verdict.lower,
                "text": verdict.text,
            }
            for verdict in verdicts
        ],
        "remarks": list(comparison.remarks),
    }


def build_measure_grid(rows: Sequence[RunMeasures]) -> Grid:
    """Return the measures as a table with one column per run; the first is the baseline."""
    lines = []
    for label, value, relation in _MEASURES:
        cells = [value(row) for row in rows]
        for index, row in enumerate(rows):
            text = MISSING if relation is None or index == 0 else relation(row)
            if text != MISSING:
                cells[index] += f"\n{text}"
        lines.append((label, *cells))
    names = [row.name for row in rows]
    return Grid(("", f"{names[0]} (baseline)", *names[1:]), tuple(lines))


def print_comparison(rows: Sequence[RunMeasures], *, console: Console | None = None) -> None:
    """Print the measures on the terminal; ratios and differences are dimmed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Three columns of numbers with their ratios fit on 80 characters; more columns need two lines.
    separator = "  " if len(rows) < 4 else "\n"
    grid = build_measure_grid(rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for heading in grid.headings[1:]:
        table.add_column(Text(heading), justify="right", overflow="fold")
    for label, *cells in grid.lines:
        texts = []
        for cell in cells:
            value, _, relation = cell.partition("\n")
            texts.append(Text.assemble(value, (f"{separator}{relation}" if relation else "", "dim")))
        table.add_row(label, *texts)
    (console or Console()).print(table)


def build_term_grid(names: Sequence[str], terms: Sequence[Mapping[str, float] | None]) -> Grid:
    """Return named terms with their share of each run's total, and the totals in the last row."""
    totals = [sum_terms(each) for each in terms]
    labels = dict.fromkeys(label for each in terms if each for label in each)

    def cell(value: float | None, total: float | None) -> str:
        share = f"\n{format_share(value / total)}" if value is not None and total else ""
        return format_exact(value) + share

    lines = [
        (
            label.replace("_", " "),
            *(cell((each or {}).get(label), total) for each, total in zip(terms, totals, strict=True)),
        )
        for label in labels
    ]
    return Grid(("term", *names), (*lines, ("total", *map(format_exact, totals))), "total")


def describe_subject(runs: Sequence[Run]) -> str:
    """Return the corpus and the size of the runs in one line."""
    baseline = runs[0]
    parts = [f"Loss on {_name_corpus(baseline)}"]
    parameters = sum_terms(baseline.summary.parameters)
    if parameters is not None:
        parts.append(f"{format_count(parameters)} parameters")
    parts.append(f"{format_count(baseline.summary.tokens)} tokens")
    return ", ".join(parts)


def describe_command(run: Run) -> str:
    """Return the shell command that trains the run again, in a new directory next to the old one."""
    config = shlex.quote(str(run.directory / "config.yaml"))
    override = shlex.quote(f"logging.run_directory={run.config.logging.run_directory}-again")
    ranks = run.summary.world_size or 1
    start = "sas-megatron train" if ranks == 1 else f"launch/torchrun.sh {ranks}"
    return f"{start} {config} {override}"


def hash_config(run: Run) -> str:
    """Return twelve hexadecimal digits that identify the resolved config of a run."""
    tree = json.dumps(run.config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(tree.encode()).hexdigest()[:12]


def build_curves(runs: Sequence[Run], *, kind: str) -> list[CurveData]:
    """Return the train or validation curve of each run; a missing loss is NaN, a gap in the line."""

    def build(run: Run, index: int, points: Sequence[CurvePoint]) -> CurveData:
        losses = [math.nan if point.loss is None else point.loss for point in points]
        spent = {axis: [run.spent(point, axis) or 0.0 for point in points] for axis in PANELS}
        return CurveData(f"{run.name}, validation", index, spent, losses)

    return [
        build(run, index, run.train_curve if kind == "train" else run.validation_curve)
        for index, run in enumerate(runs)
    ]


def _draw(figure: Figure, runs: Sequence[Run], comparison: RunComparison, *, title: str) -> None:
    figure.suptitle(title, x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    budgets = {
        axis: {
            verdict.budget
            for verdict in comparison.verdicts
            if verdict.axis == axis and verdict.budget is not None
        }
        for axis in PANELS
    }
    draw_loss_curves(
        figure,
        build_curves(runs, kind="validation"),
        train_curves=build_curves(runs, kind="train"),
        budgets=budgets,
    )


def _build_provenance_grid(runs: Sequence[Run]) -> Grid:
    lines = [
        (key, *map(_format_value, values))
        for key, values in find_differences([run.config for run in runs]).items()
    ]
    lines.append(("config hash (SHA-256)", *map(hash_config, runs)))
    lines.append(("training.seed", *(str(run.config.training.seed) for run in runs)))
    for key in dict.fromkeys(key for run in runs for key in run.provenance):
        lines.append((key.replace("_", " "), *(_format_value(run.provenance.get(key)) for run in runs)))
    return Grid(("key", *(run.name for run in runs)), tuple(lines), "texts")


def _format_value(value: Any) -> str:
    """Return a JSON value as the text of a cell, with one line per entry."""
    if value is None:
        return MISSING
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_format_value(entry)}" for key, entry in value.items()) or MISSING
    if isinstance(value, list):
        return ", ".join(_format_value(entry) for entry in value) or MISSING
    return str(value)


def _name_corpus(run: Run) -> str:
    corpus = run.provenance.get("corpus")
    if isinstance(corpus, Mapping):
        corpus = corpus.get("name")
    return corpus if isinstance(corpus, str) and corpus else Path(run.config.data.prefixes[0]).name
