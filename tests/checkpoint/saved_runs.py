"""Functions for ranks: train a few steps, save a checkpoint, and resume from it with any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from tests.model.model_parts import WeightPart, weight_parts
from tests.rank_pool import in_layout
from tests.training.training_runs import batches_of_step


def take_steps_from(engine: Any, topology: Any, first_step: int, num_steps: int) -> list[float]:
    """Train `num_steps` steps and return their losses."""
    from sas_megatron.training.step import train_step

    num_microbatches = engine.config.training.num_microbatches(topology.data_size)
    losses = []
    for step in range(first_step, first_step + num_steps):
        batches = batches_of_step(engine.config, topology, step)
        result = train_step(engine, batches, num_microbatches=num_microbatches, topology=topology)
        losses.append(result.loss)
    return losses


def save(engine: Any, topology: Any, folder: Path, step: int) -> None:
    """Save a checkpoint in the way of the training loop."""
    from sas_megatron.checkpoint.saving import CheckpointSaver

    saver = CheckpointSaver(folder, engine.config, topology)
    saver.save(
        step,
        shards=engine.shards(),
        progress={
            "counts": {"step": step},
            "engine": engine.counts(),
            "schedule_steps": engine.schedule.num_steps,
        },
        write_files=engine.write_files,
    )
    saver.finish()


def train_and_save(
    config: RunConfig, folder: Path, num_steps: int
) -> tuple[list[float], dict[str, WeightPart]]:
    """Train from step 0 and save; return the losses and the local weights at the time of saving."""
    from sas_megatron.training.build import build_engine
    from tests.training.training_runs import weight_reader

    topology = in_layout(config.parallel)
    engine = build_engine(config)
    losses = take_steps_from(engine, topology, 0, num_steps)
    save(engine, topology, folder, num_steps)
    return losses, weight_parts(engine.model_chunks, weight_reader(engine))


def resume(config: RunConfig, path: Path, first_step: int, num_steps: int, again: Path | None) -> list[float]:
    """Load a checkpoint, save it again to `again`, and return the losses of further steps."""
    from sas_megatron.checkpoint.restoring import open_checkpoint
    from sas_megatron.training.build import build_engine

    topology = in_layout(config.parallel)
    engine = build_engine(config)
    checkpoint = open_checkpoint(path)
    engine.restore(checkpoint)
    engine.schedule.step(checkpoint.progress["schedule_steps"])
    if again is not None:
        save(engine, topology, again, first_step)
    return take_steps_from(engine, topology, first_step, num_steps)


def train_with_initial_weights(config: RunConfig, path: Path) -> tuple[dict[str, WeightPart], list[float]]:
    """Return the local weights after loading initial weights, and the losses of two steps."""
    from sas_megatron.training.build import build_engine
    from tests.training.training_runs import weight_reader

    topology = in_layout(config.parallel)
    engine = build_engine(config, initial_weights=path)
    weights = weight_parts(engine.model_chunks, weight_reader(engine))
    return weights, take_steps_from(engine, topology, 0, 2)


def read_unsharded_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the unsharded weights and optimizer states of a checkpoint."""
    from sas_megatron.checkpoint.tensor_reading import RANDOM_PREFIX, TensorReader

    reader = TensorReader(path)
    return {name: reader.read(name) for name in reader.shapes() if not name.startswith(RANDOM_PREFIX)}
