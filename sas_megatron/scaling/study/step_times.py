"""Seconds of a step of each of a study's cells, measured in turn: what its time axis is made of.

A run's own seconds tell as much of what else the machine did as of the run. Rounds in which every cell
has its turn are comparable, and so are their medians.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sas_megatron.config.run import RunConfig
from sas_megatron.data.writing import write_file
from sas_megatron.scaling.study.plan import Plan

RECORD = "step_seconds.json"

# Runs, rounds -> by round, the seconds of a step of each.
Measure = Callable[[list[RunConfig], int], list[list[float]]]


def measure_step_times(plan: Plan, measure: Measure, *, rounds: int, machine: dict[str, Any]) -> Path:
    """Measures every cell `rounds` times and writes it down; what was there before is replaced."""
    by_round = measure([cell.config for cell in plan.cells], rounds)
    record = {
        "machine": machine,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "step_seconds": {
            cell.name: list(seconds)
            for cell, seconds in zip(plan.cells, zip(*by_round, strict=True), strict=True)
        },
    }
    path = Path(plan.study.directory) / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(record, indent=2) + "\n")
    return path


def describe_step_times(plan: Plan) -> list[str]:
    """Where the seconds of a step are from, and whose are missing; nothing before any was measured."""
    path = Path(plan.study.directory) / RECORD
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    machine = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    remarks = [f"Seconds of a step were measured on {machine}, at {record['measured_at']}."]
    missing = sorted({cell.name for cell in plan.cells} - set(record["step_seconds"]))
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        remarks.append(
            f"No seconds of a step were measured for {named}, so that time is that of each run's own "
            "training; run `sas-megatron study time` again."
        )
    return remarks


def read_step_times(plan: Plan) -> dict[str, float]:
    """Median seconds of a step by the cell's name; empty before anything was measured."""
    path = Path(plan.study.directory) / RECORD
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return {name: statistics.median(seconds) for name, seconds in record["step_seconds"].items()}
