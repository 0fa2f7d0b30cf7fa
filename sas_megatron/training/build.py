"""Build the model and the engine that trains it, from a config."""

from __future__ import annotations

from pathlib import Path

from sas_megatron.checkpoint.initial_weights import load_initial_weights
from sas_megatron.config.run import RunConfig
from sas_megatron.model.assembly import build_gpt_chunks
from sas_megatron.training.engine import Engine


def build_engine(config: RunConfig, *, initial_weights: Path | None = None) -> Engine:
    """Builds model, optimizer and schedule on this rank, by `training.engine`; its groups must exist.

    Args:
        config: The run.
        initial_weights: What to begin with (as `checkpoint.initial_weights`) in place of drawn weights.
    """
    pieces = build_gpt_chunks(config)
    if initial_weights is not None:  # before the optimizer copies them
        load_initial_weights(initial_weights, pieces, config)
    if config.training.engine == "deepspeed":
        from sas_megatron.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, pieces)
    from sas_megatron.training.megatron_engine import MegatronEngine

    return MegatronEngine(config, pieces)
