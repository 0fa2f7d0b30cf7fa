"""Layouts of a study's runs, as a search over the simulator found them, with the seconds of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sas_megatron.config.loading import flatten_config
from sas_megatron.config.run import RunConfig
from sas_megatron.io.files import save_file
from sas_megatron.scaling.study.study_file import Study

RECORD = "layouts.json"
# What a layout decides: what a search may change, and nothing that decides a result.
DECIDED = ("parallel.", "optimizer.distributed", "training.micro_batch_size", "training.recompute")


@dataclass(frozen=True)
class CellLayout:
    """Fields of a cell's config, and the seconds that a step of it is estimated to take."""

    changes: Mapping[str, Any]
    step_seconds: float


Layouts = Mapping[str, CellLayout]


def write_layouts(study: Study, layouts: Layouts, *, hardware: str) -> Path:
    """Writes down what a search found; plans take it from there on."""
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
    """Those that were found; empty before a search."""
    path = Path(study.directory) / RECORD
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: CellLayout(layout["changes"], layout["step_seconds"])
        for name, layout in record["layouts"].items()
    }


def layout_changes(config: RunConfig) -> dict[str, Any]:
    """The fields of a config that its layout decides, as `RunConfig.replaced` takes them."""
    return {field: value for field, value in flatten_config(config).items() if field.startswith(DECIDED)}
