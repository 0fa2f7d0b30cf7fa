"""Seconds per step of each cell of a study, measured in alternation, for the study's time axis.

The training time of a run also depends on other load on the machine. In each round every cell is measured
once, so that rounds, and the medians over them, are comparable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import flatten_config
from sas_megatron.config.run import RunConfig
from sas_megatron.io.files import save_file
from sas_megatron.platform.local_machine import OtherLoad
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

# Processors that other processes may use during a measurement.
QUIET_PROCESSORS = 0.2

# Configs and number of rounds -> for each round, the seconds per step of each config.
StepTimer = Callable[[list[RunConfig], int], list[list[float]]]


def measure_step_times(
    plans: Sequence[Plan], timer: StepTimer, *, rounds: int, machine: dict[str, Any]
) -> list[Path]:
    """Measure every cell `rounds` times and record the results of each study, replacing earlier records.

    Cells of several studies with equal configs are measured once.

    Args:
        plans: The plans whose cells are measured.
        timer: Measures the steps.
        rounds: Measurements per cell.
        machine: Description of the machine, for the record.
    """
    configs = {_identify(cell): cell.config for plan in plans for cell in plan.cells}
    load = OtherLoad()
    by_round = timer(list(configs.values()), rounds)
    seconds = dict(zip(configs, map(list, zip(*by_round, strict=True)), strict=True))
    common = {
        "machine": machine,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "other_load": load.measure(),
    }
    paths = []
    for plan in plans:
        cells = {
            cell.name: {"step_seconds": seconds[_identify(cell)], "config": _list_timed_fields(cell)}
            for cell in plan.cells
        }
        paths.append(plan.directory / RECORD)
        text = json.dumps({**common, "cells": cells}, indent=2) + "\n"
        save_file(paths[-1], text, remedy="choose another directory in the study file")
    return paths


def check_quiet(load: float | None) -> None:
    """Check that other processes use less than `QUIET_PROCESSORS`.

    Args:
        load: The processors that other processes use; None if it is not known.

    Raises:
        UserError: They use more.
    """
    if load is not None and load > QUIET_PROCESSORS:
        raise UserError(
            f"other processes use {load:.1f} of {os.cpu_count()} processors, which changes the measured "
            "times; stop them, or measure anyway with --on-busy-machine"
        )


def describe_step_times(plan: Plan) -> list[str]:
    """Return remarks on the measured step times and on cells without one; empty if none were measured."""
    record = _read_record(plan)
    if record is None:
        return []
    machine = format_fields(record.machine)
    remarks = [f"Step times were measured on {machine}, at {record.measured_at}."]
    if record.other_load is not None and record.other_load > QUIET_PROCESSORS:
        remarks.append(
            f"Other processes used {record.other_load:.1f} processors while the step times were measured."
        )
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


def _identify(cell: Cell) -> str:
    return json.dumps(_list_timed_fields(cell), sort_keys=True)


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
