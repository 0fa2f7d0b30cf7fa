"""Whole weights that training can start from, and the record beside them; no torch.

FOLDER/weights*.safetensors   under global names
       weights.json           what they are and where they are from
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sas_megatron.config.errors import FileProblem

SCHEMA_VERSION = 1
STEM = "weights"
RECORD = "weights.json"


class WeightsRecord(BaseModel):
    """What weights are of, and where they are from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    # What decides the function that they compute (`describe_architecture`).
    architecture: dict[str, dict[str, Any]]
    weights_sha256: str
    origin: str

    def write(self, folder: Path) -> None:
        """As `RECORD`."""
        (folder / RECORD).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path) -> WeightsRecord:
    """The record of whole weights; raises `FileProblem` where there is none that can be read."""
    path, remedy = folder / RECORD, "name a folder that `sas-megatron checkpoint import` wrote"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("schema_version", 0) > SCHEMA_VERSION:
            raise FileProblem(path, f"is newer than format {SCHEMA_VERSION}", "update the package")
        return WeightsRecord.model_validate(fields)
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise FileProblem(path, f"is no record of whole weights ({reason})", remedy) from None
