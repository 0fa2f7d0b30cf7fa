"""The whole weights of a run's checkpoint, and the config that trained them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from sas_megatron.checkpoint.importing import WholeModel
from sas_megatron.checkpoint.rank_files import find_newest_checkpoint
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.run import RunConfig


def find_checkpoint(path: Path) -> tuple[Path, RunConfig]:
    """A checkpoint and its run's config.

    Args:
        path: A run's directory, of which the newest checkpoint is taken, or a checkpoint in it.

    Raises:
        FileProblem: there is none.
    """
    checkpoint = path if path.parent.name == "checkpoints" else find_newest_checkpoint(path / "checkpoints")
    if checkpoint is None or not checkpoint.is_dir():
        raise FileProblem(
            path, "holds no checkpoint", "name a run's directory, or a folder in its checkpoints/"
        )
    return checkpoint, load_run_config(checkpoint.parents[1] / "config.yaml")


def open_checkpoint(path: Path) -> tuple[WholeModel, RunConfig]:
    """A checkpoint's whole weights under global names, and its run's config.

    Raises:
        UserError: there is none at `path`, or its weights lie in the parts of several ranks.
    """
    checkpoint, config = find_checkpoint(path)
    weights = load_whole_weights(checkpoint)
    whole = WholeModel(config.model, config.attention, weights.items(), f"{checkpoint.resolve()}")
    return whole, config


def load_whole_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Whole weights by global name, of one rank's file: that of a model on one rank."""
    layout = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["layout"]
    state = torch.load(checkpoint / "rank_00000.pt", map_location="cpu", weights_only=True, mmap=True)
    pieces = state["engine"].get("model")
    if layout["tensor"] * layout["pipeline"] > 1 or pieces is None:
        raise FileProblem(
            checkpoint,
            "has the weights of several tensor or pipeline ranks, or DeepSpeed's",
            "train with parallel.tensor=1, parallel.pipeline=1 and training.engine=megatron",
        )
    (weights,) = pieces
    return dict(weights)
