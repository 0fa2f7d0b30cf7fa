"""Parallel layouts of a study's cells, found by a search over estimates, with their seconds per step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sas_megatron.config.loading import flatten_config
from sas_megatron.config.run import RunConfig
from sas_megatron.io.files import save_file
from sas_megatron.scaling.study.recorded import LayoutsRecord, read_recorded
from sas_megatron.scaling.study.study_file import Study

RECORD = "layouts.json"
# Fields that a layout search may change; none of them affects a result.
LAYOUT_FIELDS = ("parallel.", "optimizer.distributed", "training.micro_batch_size", "training.recompute")


@dataclass(frozen=True)
class CellLayout:
    """Changed fields of a cell's config, and the estimated seconds per step."""

    changes: Mapping[str, Any]
    step_seconds: float


Layouts = Mapping[str, CellLayout]


def write_layouts(study: Study, layouts: Layouts, *, hardware: str) -> Path:
    """Record the layouts of a search; plans use them from then on. Return the path of the record."""
    record = {
        "hardware": hardware,
        "processes": study.machine.processes,
        "layouts": {
            name: {"changes": dict(layout.changes), "step_seconds": layout.step_seconds}
            for name, layout in layouts.items()
        },
    }
    path = Path(study.directory) / RECORD
    save_file(path, json.dumps(record, indent=2) + "\n", remedy="choose another directory in the study file")
    return path


def read_layouts(study: Study) -> Layouts:
    """Return the recorded layouts by the name of the cell; empty before a search.

    Raises:
        FileProblem: The record is damaged.
    """
    path = Path(study.directory) / RECORD
    record = read_recorded(path, LayoutsRecord, remedy="run `sas-megatron study layout` again, or remove it")
    layouts = {} if record is None else record.layouts
    return {name: CellLayout(layout.changes, layout.step_seconds) for name, layout in layouts.items()}


def layout_changes(config: RunConfig) -> dict[str, Any]:
    """Return the layout fields of a config, in the form that `RunConfig.replaced` accepts."""
    return {
        field: value for field, value in flatten_config(config).items() if field.startswith(LAYOUT_FIELDS)
    }
