"""Small runs, trained for some steps, and their exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout
from tests.small_data import SmallData


@dataclass(frozen=True)
class TrainedRun:
    """A run's directory, and its newest checkpoint as a model for transformers."""

    directory: Path
    exported: Path


def complete(config: RunConfig) -> None:
    """On the one rank of a pool: the run."""
    from sas_megatron.training.loop import Run

    Run(config, in_layout(config.parallel, seed=config.training.seed)).complete()


def export(directory: Path, folder: Path) -> None:
    """On the one rank of a pool: its newest checkpoint for transformers."""
    from sas_megatron.checkpoint.export import export_model
    from sas_megatron.checkpoint.unsharded_weights import open_run_weights

    trained = open_run_weights(directory)
    export_model(trained.weights, trained.config, folder=folder)


def train_and_export(
    ranks: Any, small_data: SmallData, folder: Path, attention: dict[str, Any]
) -> TrainedRun:
    """A run of twelve steps, with a checkpoint in the middle, and tables of 64 rows beyond its tokens."""
    config = small_data.run(
        folder / "run",
        model={"vocab_multiple": 96},
        training={"num_steps": 12},
        optimizer={"learning_rate": 2e-2},
        checkpoint={"interval": 6},
    )
    tree = config.model_dump(mode="json", exclude_unset=True)
    from sas_megatron.config.loading import build_run_config

    ranks(1).run(complete, build_run_config({**tree, "attention": attention}))
    ranks(1).run(export, folder / "run", folder / "exported")
    return TrainedRun(folder / "run", folder / "exported")


def load_on_rank(directory: Path, overrides: list[str]) -> Any:
    """On a rank: the `TrainedModel` of a run, and what was found of it, in the pool's world."""
    from sas_megatron.evaluation import start
    from sas_megatron.evaluation.trained_model import load_trained_model

    launched, start.launched_world_size = start.launched_world_size, _world_size
    try:
        found = start.find_model(directory, overrides=overrides)
    finally:
        start.launched_world_size = launched
    topology = in_layout(found.config.parallel)
    return load_trained_model(found.checkpoint, found.config, found.tokenizer, topology), found


def _world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size()
