"""Seconds per step of each cell of a study, measured in alternation, for the study's time axis.

The training time of a run also depends on other load on the machine. In each round every cell is measured
once, so that rounds, and the medians over them, are comparable.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sas_megatron.config.loading import flatten_config
from sas_megatron.config.run import RunConfig
from sas_megatron.io.files import save_file
from sas_megatron.scaling.numbers import format_fields, format_some
from sas_megatron.scaling.study.plan import Cell, Plan
from sas_megatron.scaling.study.recorded import StepSecondsRecord, read_recorded

RECORD = "step_seconds.json"
# Fields that affect the time of a step: a measurement is valid only for equal values of these.
TIMED_FIELDS = (
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

# Configs and number of rounds -> for each round, the seconds per step of each config.
StepTimer = Callable[[list[RunConfig], int], list[list[float]]]


def measure_step_times(plan: Plan, timer: StepTimer, *, rounds: int, machine: dict[str, Any]) -> Path:
    """Measure every cell `rounds` times and record the results, replacing an earlier record.

    Args:
        plan: The plan whose cells are measured.
        timer: Measures the steps.
        rounds: Measurements per cell.
        machine: Description of the machine, for the record.
    """
    by_round = timer([cell.config for cell in plan.cells], rounds)
    record = {
        "machine": machine,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cells": {
            cell.name: {"step_seconds": list(seconds), "config": _list_timed_fields(cell)}
            for cell, seconds in zip(plan.cells, zip(*by_round, strict=True), strict=True)
        },
    }
    path = plan.directory / RECORD
    save_file(path, json.dumps(record, indent=2) + "\n", remedy="choose another directory in the study file")
    return path


def describe_step_times(plan: Plan) -> list[str]:
    """Return remarks on the measured step times and on cells without one; empty if none were measured."""
    record = _read_record(plan)
    if record is None:
        return []
    machine = format_fields(record.machine)
    remarks = [f"Step times were measured on {machine}, at {record.measured_at}."]
    missing = sorted({cell.name for cell in plan.cells} - set(read_step_times(plan)))
    if missing:
        remarks.append(
            f"The step times of {format_some(missing)} were not measured with the current config: the time "
            "axis uses the training time of each run. Run `sas-megatron study time` again."
        )
    return remarks


def read_step_times(plan: Plan) -> dict[str, list[float]]:
    """Return by name the seconds per step, by round, of the cells measured with their current config."""
    record = _read_record(plan)
    measured = {} if record is None else record.cells
    return {
        cell.name: measured[cell.name].step_seconds
        for cell in plan.cells
        if cell.name in measured and _is_measured_config(cell, measured[cell.name].config)
    }


def _read_record(plan: Plan) -> StepSecondsRecord | None:
    remedy = "run `sas-megatron study time` again, or remove it"
    return read_recorded(plan.directory / RECORD, StepSecondsRecord, remedy=remedy)


def _list_timed_fields(cell: Cell, *, exclude_defaults: bool = False) -> dict[str, Any]:
    fields = flatten_config(cell.config, exclude_defaults=exclude_defaults)
    return {name: value for name, value in fields.items() if name.startswith(TIMED_FIELDS)}


def _is_measured_config(cell: Cell, measured: dict[str, Any]) -> bool:
    """Whether the recorded fields are those of the cell; fields that the record lacks must be defaults."""
    current = _list_timed_fields(cell)
    added = current.keys() - measured.keys()
    return {**measured, **{name: current[name] for name in added}} == current and not (
        added & _list_timed_fields(cell, exclude_defaults=True).keys()
    )
