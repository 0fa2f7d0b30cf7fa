"""The measures of a comparison as rows of text, one column a run; the page and the terminal share them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sas_megatron.scaling.comparison import ComparisonRow
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
)

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Cell:
    """A value, and how it stands to the baseline's (empty where that is not said)."""

    text: str
    against_baseline: str = ""


@dataclass(frozen=True)
class Measure:
    """One line of the table: a label and a cell for each run."""

    label: str
    cells: tuple[Cell, ...]


_Value = Callable[[ComparisonRow], str]
_MEASURES: tuple[tuple[str, _Value, _Value | None], ...] = (
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


def build_measures(rows: Sequence[ComparisonRow]) -> tuple[Measure, ...]:
    """The table, transposed so that a handful of runs fits a narrow page; the first row is the baseline."""
    return tuple(
        Measure(
            label, tuple(_build_cell(row, value, against if row is not rows[0] else None) for row in rows)
        )
        for label, value, against in _MEASURES
    )


def _build_cell(row: ComparisonRow, value: _Value, against: _Value | None) -> Cell:
    relation = against(row) if against else ""
    return Cell(value(row), "" if relation == MISSING else relation)


def print_comparison(rows: Sequence[ComparisonRow], *, console: Console | None = None) -> None:
    """Prints the table on the terminal; ratios and differences against the first row are dimmed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Four columns and more leave no room for two numbers side by side on 80 characters.
    between = "  " if len(rows) < 4 else "\n"
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    for number, row in enumerate(rows):
        table.add_column(
            Text(row.name if number else f"{row.name} (baseline)"), justify="right", overflow="fold"
        )
    for measure in build_measures(rows):
        cells = [
            Text.assemble(
                cell.text, (f"{between}{cell.against_baseline}" if cell.against_baseline else "", "dim")
            )
            for cell in measure.cells
        ]
        table.add_row(measure.label, *cells)
    (console or Console()).print(table)
