"""Unsharded models, and the unsharded weights of checkpoints, read in one process without Megatron-core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sas_megatron.checkpoint.manifest import CONFIG, verify_checkpoint
from sas_megatron.checkpoint.tensor_files import NamedTensors
from sas_megatron.checkpoint.tensor_reading import OPTIMIZER_PREFIX, RANDOM_PREFIX, TensorReader
from sas_megatron.checkpoint.trained_run import (
    offering_another_checkpoint,
    select_checkpoint,
    suggest_iteration,
    suggest_path,
)
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.loading import build_run_config, read_yaml
from sas_megatron.config.model import ModelConfig
from sas_megatron.config.run import RunConfig


@dataclass(frozen=True)
class UnshardedModel:
    """The config sections and the full weights, under global names, of a model from any source.

    `tensors` is an iterable that reads each weight when it is reached.
    """

    model: ModelConfig
    attention: AttentionConfig
    tensors: NamedTensors
    # Location of the weights.
    origin: str


class UnshardedWeights(Mapping[str, torch.Tensor]):
    """The full weights of a checkpoint by global name. Each weight is read when it is accessed.

    Raises:
        DamagedCheckpoint: The tensors cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._reader = TensorReader(path)
        self._shapes = {
            name: shape
            for name, shape in self._reader.shapes().items()
            if not name.startswith((OPTIMIZER_PREFIX, RANDOM_PREFIX))
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all weights by name. The weights are not read."""
        return dict(self._shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        return self._reader.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@dataclass(frozen=True)
class RunWeights:
    """The unsharded weights of a checkpoint and the config of the run that trained them."""

    config: RunConfig
    weights: UnshardedWeights
    checkpoint: Path

    @property
    def origin(self) -> str:
        """The absolute path of the checkpoint."""
        return str(self.checkpoint.resolve())

    def to_unsharded_model(self) -> UnshardedModel:
        """Return the weights as an `UnshardedModel`, the type of imported models."""
        return UnshardedModel(self.config.model, self.config.attention, self.weights.items(), self.origin)


def load_unsharded_weights(path: Path) -> tuple[dict[str, Any], UnshardedWeights]:
    """Verify the checkpoint at `path`; return its config as plain mappings and its unsharded weights.

    One process does this, without process groups and whatever the layout that saved the checkpoint. Tied
    embeddings occur once, under the name of the input embedding.

    Raises:
        DamagedCheckpoint: Files are damaged. The message names them.
        FileProblem: This version does not read the checkpoint's format.
    """
    verify_checkpoint(path)
    return read_yaml(path / CONFIG), UnshardedWeights(path)


def open_run_weights(source: Path, *, iteration: int | None = None, has_iteration: bool = True) -> RunWeights:
    """Verify every file of a checkpoint, of any layout and engine, and open its weights.

    Args:
        source: A checkpoint, or a run directory, whose newest checkpoint is used.
        iteration: Step of the checkpoint of a run directory; None selects the newest.
        has_iteration: Whether the user can select the step with `--iteration`, for messages.

    Raises:
        UserError: The checkpoint is missing or damaged, or this version does not read its format.
    """
    checkpoint = select_checkpoint(source, iteration=iteration)
    suggest = suggest_iteration(source, checkpoint) if has_iteration else suggest_path
    with offering_another_checkpoint(checkpoint, suggest):
        tree, weights = load_unsharded_weights(checkpoint)
    return RunWeights(build_run_config(tree), weights, checkpoint)
