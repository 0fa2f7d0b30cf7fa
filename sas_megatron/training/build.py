"""Builds the model and the engine that trains it, from a config.

config -> model chunks of this rank -> (initial weights) -> engine: optimizer, schedule, data parallelism
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sas_megatron.checkpoint.initial_weights import load_initial_weights
from sas_megatron.config.run import RunConfig
from sas_megatron.model.assembly import build_gpt_chunks
from sas_megatron.training.deepspeed_engine import DeepSpeedEngine
from sas_megatron.training.engine import Engine
from sas_megatron.training.megatron_engine import MegatronEngine


def build_engine(config: RunConfig, *, initial_weights: Path | None = None) -> Engine:
    """Build model, optimizer and schedule on this rank. The process groups must exist.

    Args:
        config: The run; `training.engine` selects the engine.
        initial_weights: Weights to load (as `checkpoint.initial_weights`); without them, the model keeps its
            random initial weights.

    Raises:
        FileProblem: The initial weights cannot be read or do not fit the model.
    """
    model_chunks = build_gpt_chunks(config)
    if initial_weights is not None:  # before the optimizer copies the weights
        load_initial_weights(initial_weights, model_chunks, config)
    return wrap_in_engine(config, model_chunks)


def wrap_in_engine(config: RunConfig, model_chunks: list[Any]) -> Engine:
    """Return the engine that `training.engine` selects, for model chunks that have their initial weights."""
    engine = DeepSpeedEngine if config.training.engine == "deepspeed" else MegatronEngine
    return engine(config, model_chunks)
