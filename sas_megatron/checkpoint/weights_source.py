"""What a new run can begin with, told by what the folder holds, if it is of the same model; no torch.

weights.json                       whole weights, as `checkpoint import` writes them
manifest.json                      a checkpoint, of any layout and engine
checkpoints/, or iter_0001000/ …   a run, of which the newest checkpoint is taken
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sas_megatron.checkpoint.architecture import check_equal, check_same_rows, describe_architecture
from sas_megatron.checkpoint.manifest import (
    CONFIG,
    MANIFEST,
    describe_file,
    find_checkpoint,
    find_damage,
    read_manifest,
    refuse_damage,
)
from sas_megatron.checkpoint.weights_record import RECORD, read_record
from sas_megatron.config.errors import FileProblem, UserError
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.run import RunConfig


@dataclass(frozen=True)
class WeightsSource:
    """A checkpoint, or a folder of whole weights."""

    folder: Path
    is_checkpoint: bool

    def describe(self) -> dict[str, Any]:
        """What tells these weights from any others, for run.json."""
        folder = {"folder": str(self.folder.resolve())}
        if self.is_checkpoint:
            manifest_sha256 = describe_file(self.folder / MANIFEST).sha256
            return {**folder, "step": read_manifest(self.folder).step, "manifest_sha256": manifest_sha256}
        record = read_record(self.folder)
        return {**folder, "origin": record.origin, "weights_sha256": record.weights_sha256}


def find_weights(path: Path, config: RunConfig) -> WeightsSource:
    """The weights at `path`, as `checkpoint.initial_weights` names them, for the model of `config`.

    Raises:
        UserError: there are none that can be used, or they are of another model.
    """
    wanted = describe_architecture(config.model, config.attention)
    if (path / RECORD).exists():
        check_equal(read_record(path).architecture, wanted, origin=path)
        return WeightsSource(path, is_checkpoint=False)
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise FileProblem(
            path,
            "holds neither a checkpoint nor weights that `sas-megatron checkpoint import` wrote",
            "give one of these, such as run/checkpoints/iter_0001000, or a run's directory",
        )
    saved = read_checkpoint_config(checkpoint)
    check_equal(describe_architecture(saved.model, saved.attention), wanted, origin=checkpoint)
    check_same_rows(saved.model, config.model, origin=checkpoint)
    return WeightsSource(checkpoint, is_checkpoint=True)


def read_checkpoint_config(checkpoint: Path) -> RunConfig:
    """The config of the run that saved a checkpoint; raises `FileProblem` where it is damaged."""
    files = read_manifest(checkpoint).files
    # The others are read by all ranks together, when they load.
    refuse_damage(checkpoint, find_damage(checkpoint, {CONFIG: files[CONFIG]}))
    try:
        return load_run_config(checkpoint / CONFIG)
    except UserError as error:
        raise FileProblem(
            checkpoint / CONFIG,
            f"is no config here ({error})",
            "use the version of the package that wrote it",
        ) from None
