"""Tables of `study probes`: what happens inside the models of a study, side by side."""

from __future__ import annotations

from typing import Any

from sas_megatron.cli.study_tables import build_console, build_table
from sas_megatron.config.errors import UserError
from sas_megatron.scaling.study.analysis import cut_slices
from sas_megatron.scaling.study.mechanisms import (
    HEADINGS,
    MECHANISMS,
    Runs,
    choose_runs,
    describe_runs,
    mechanism_grid,
)
from sas_megatron.scaling.study.study_table import StudyTable


def measured_slices(table: StudyTable) -> dict[str, Runs]:
    """Return the measured runs of each slice of a study by its name, which is empty for a single slice.

    Raises:
        UserError: No run has measured anything inside its model.
    """
    slices = {part.name: choose_runs(part.rows) for part in cut_slices(table)}
    measured = {name: runs for name, runs in slices.items() if runs}
    if not measured:
        raise UserError(
            f"{table.name}: no run has measured what happens inside its model; set "
            "evaluation.probe_sequences=2 in the study's base and run it again"
        )
    return measured


def mechanism_record(slices: dict[str, Runs]) -> list[dict[str, Any]]:
    """Return the values of the tables as JSON values: one object for each run."""
    return [
        {
            "slice": name,
            "variant": variant,
            "run": row.run,
            "steps": row.layer_steps,
            "means": row.layer_curves,
            "layers": row.layer_values,
        }
        for name, runs in slices.items()
        for variant, rows in runs.items()
        for row in rows
    ]


def print_mechanisms(slices: dict[str, Runs]) -> None:
    """Print a table for each mechanism that was measured."""
    console = build_console()
    for name, runs in slices.items():
        console.print(describe_runs(runs, name=name), style="italic", soft_wrap=False)
        for mechanism in MECHANISMS:
            grid = mechanism_grid(mechanism, runs)
            if grid is None:
                continue
            console.print(f"\n{mechanism.question}", style="bold", soft_wrap=False)
            console.print(mechanism.meaning, soft_wrap=False)
            table = build_table(*HEADINGS, right=HEADINGS[2:])
            previous = ""
            for variant, *cells in grid.lines:
                table.add_row("" if variant == previous else variant, *cells)
                previous = variant
            console.print(table)
