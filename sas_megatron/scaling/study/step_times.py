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

from sas_megatron.config.loading import flatten_config
from sas_megatron.config.run import RunConfig
from sas_megatron.io.files import save_file
from sas_megatron.scaling.numbers import format_fields, format_some
from sas_megatron.scaling.study.plan import Cell, Plan

RECORD = "step_seconds.json"
# What decides how long a step takes: seconds measured with other values of these are another config's.
DECISIVE = (
    "attention.",
    "data.reset_at_document_ends",
    "data.sequence_length",
    "deepspeed.",
    "model.",
    "optimizer.distributed",
    "parallel.",
    "training.engine",
    "training.global_batch_size",
    "training.micro_batch_size",
    "training.precision",
    "training.recompute",
)

# Runs, rounds -> by round, the seconds of a step of each.
Measure = Callable[[list[RunConfig], int], list[list[float]]]


def measure_step_times(plan: Plan, measure: Measure, *, rounds: int, machine: dict[str, Any]) -> Path:
    """Measures every cell `rounds` times and writes it down; what was there before is replaced."""
    by_round = measure([cell.config for cell in plan.cells], rounds)
    record = {
        "machine": machine,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cells": {
            cell.name: {"step_seconds": list(seconds), "config": _decisive_fields(cell)}
            for cell, seconds in zip(plan.cells, zip(*by_round, strict=True), strict=True)
        },
    }
    path = Path(plan.study.directory) / RECORD
    save_file(path, json.dumps(record, indent=2) + "\n", remedy="choose another directory in the study file")
    return path


def describe_step_times(plan: Plan) -> list[str]:
    """Where the seconds of a step are from, and whose are missing; nothing before any was measured."""
    record = _read_record(plan)
    if record is None:
        return []
    machine, when = format_fields(record["machine"]), record["measured_at"]
    remarks = [f"Seconds of a step were measured on {machine}, at {when}."]
    missing = sorted({cell.name for cell in plan.cells} - set(read_step_times(plan)))
    if missing:
        remarks.append(
            f"No seconds of a step were measured for {format_some(missing)} as the study has them now, so "
            "that time is that of each run's own training; run `sas-megatron study time` again."
        )
    return remarks


def read_step_times(plan: Plan) -> dict[str, float]:
    """Median seconds of a step by the cell's name, of those cells that were measured as they are now."""
    record = _read_record(plan)
    measured = {} if record is None else record["cells"]
    return {
        cell.name: statistics.median(measured[cell.name]["step_seconds"])
        for cell in plan.cells
        if cell.name in measured and measured[cell.name]["config"] == _decisive_fields(cell)
    }


def _read_record(plan: Plan) -> dict[str, Any] | None:
    path = Path(plan.study.directory) / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _decisive_fields(cell: Cell) -> dict[str, Any]:
    return {name: value for name, value in flatten_config(cell.config).items() if name.startswith(DECISIVE)}
