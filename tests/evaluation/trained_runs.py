"""Small trained runs and their exports."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout
from tests.small_data import SmallData


@dataclass(frozen=True)
class TrainedRun:
    """A run directory, and the Hugging Face export of its newest checkpoint."""

    directory: Path
    exported: Path


def train(config: RunConfig) -> None:
    """Train a run to its end. Runs on a pool of one rank."""
    from sas_megatron.training.loop import Run

    Run(config, in_layout(config.parallel, seed=config.training.seed)).complete()


def export(directory: Path, folder: Path) -> None:
    """Export the newest checkpoint of a run. Runs on a pool of one rank."""
    from sas_megatron.checkpoint.export import export_model
    from sas_megatron.checkpoint.unsharded_weights import open_run_weights

    trained = open_run_weights(directory)
    export_model(trained.weights, trained.config, folder=folder)


def train_and_export(
    ranks: Any, small_data: SmallData, folder: Path, attention: dict[str, Any]
) -> TrainedRun:
    """Train a run of 12 steps with two checkpoints and a padded vocabulary, and export it."""
    config = small_data.run(
        folder / "run",
        model={"vocab_multiple": 96},
        training={"num_steps": 12},
        optimizer={"learning_rate": 2e-2},
        checkpoint={"interval": 6},
    )
    tree = config.model_dump(mode="json", exclude_unset=True)
    from sas_megatron.config.loading import build_run_config

    ranks(1).run(train, build_run_config({**tree, "attention": attention}))
    ranks(1).run(export, folder / "run", folder / "exported")
    return TrainedRun(folder / "run", folder / "exported")


def load_on_rank(directory: Path, overrides: list[str]) -> Any:
    """Load the model of a run in the world of the rank pool; return it and its `ModelSource`."""
    from sas_megatron.evaluation import model_source
    from sas_megatron.evaluation.trained_model import load_trained_model

    original, model_source.launched_world_size = model_source.launched_world_size, _world_size
    try:
        source = model_source.find_model_source(directory, overrides=overrides)
    finally:
        model_source.launched_world_size = original
    topology = in_layout(source.config.parallel)
    model = load_trained_model(source.checkpoint, source.config, source.tokenizer, topology)
    return model, source


def _world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size()
