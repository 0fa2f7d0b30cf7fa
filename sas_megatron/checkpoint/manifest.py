"""Whole weights that training can start from, and the record beside them; no torch.

FOLDER/weights*.safetensors   under global names
       manifest.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sas_megatron.checkpoint.architecture import check_equal, describe_architecture
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.run import RunConfig

SCHEMA_VERSION = 1
STEM = "weights"


class WeightsManifest(BaseModel):
    """What weights are of, and where they are from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    # What decides the function that they compute (`describe_architecture`).
    architecture: dict[str, dict[str, Any]]
    weights_sha256: str
    origin: str

    def write(self, folder: Path) -> None:
        """As manifest.json."""
        (folder / "manifest.json").write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> WeightsManifest:
    """The record of whole weights; raises `FileProblem` where there is none that can be read."""
    path, remedy = folder / "manifest.json", "name a folder that `sas-megatron checkpoint import` wrote"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.get("schema_version", 0) > SCHEMA_VERSION:
            raise FileProblem(path, f"is newer than format {SCHEMA_VERSION}", "update the package")
        return WeightsManifest.model_validate(fields)
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise FileProblem(path, f"is no record of whole weights ({reason})", remedy) from None


def check_initial_weights(config: RunConfig) -> None:
    """Raises `UserError` where `checkpoint.initial_weights` names none, or those of another model."""
    if config.checkpoint.initial_weights is None:
        return
    folder = Path(config.checkpoint.initial_weights)
    check_equal(
        read_manifest(folder).architecture,
        describe_architecture(config.model, config.attention),
        origin=folder,
    )
