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


def read_step_times(plan: Plan) -> dict[str, float]:
    """Median seconds of a step by the cell's name; empty before anything was measured."""
    path = Path(plan.study.directory) / RECORD
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return {name: statistics.median(seconds) for name, seconds in record["step_seconds"].items()}
