"""The small version of a run that `doctor --layout` trains, and the same run in one process. No torch."""

from __future__ import annotations

import math
from typing import Any

from sas_megatron.config.optimizer import DeepSpeedConfig
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig

NUM_STEPS = 3
# Limits of the small version's dimensions, which are rounded up to what the layout can shard.
HIDDEN_SIZE, FFN_HIDDEN_SIZE, VOCAB_SIZE, SEQUENCE_LENGTH = 256, 512, 1000, 128


def small_version(config: RunConfig, *, world_size: int) -> RunConfig:
    """Return a run with the layout, precision, engine and attention heads of a config, and little else.

    It has one layer per model chunk and at least two, smaller widths, short sequences that are not separated
    at document ends, no dropout, whose masks depend on the layout, and a constant learning rate.

    Raises:
        UserError: The config is not valid for `world_size` ranks.
    """
    config.check_world_size(world_size)
    parallel, model = config.parallel, config.model
    num_chunks = parallel.pipeline * parallel.virtual_pipeline
    data_size = world_size // parallel.model_size
    # Pipeline stages with interleaved chunks process microbatches in groups.
    num_microbatches = math.lcm(2, parallel.microbatch_group_size)
    length = _limit(config.data.sequence_length, SEQUENCE_LENGTH, 2 * parallel.context * parallel.tensor)
    small = config.replaced(
        {
            "model.num_layers": num_chunks if num_chunks > 1 else 2,
            "model.hidden_size": min(model.hidden_size, HIDDEN_SIZE),
            "model.ffn_hidden_size": _limit(model.ffn_hidden_size, FFN_HIDDEN_SIZE, parallel.tensor),
            "model.vocab_size": min(model.vocab_size, VOCAB_SIZE),
            "model.hidden_dropout": 0.0,
            "attention.dropout": 0.0,
            "parallel.first_stage_layers": None,
            "parallel.last_stage_layers": None,
            "data.sequence_length": length,
            "data.reset_at_document_ends": False,
            "schedule.kind": "constant",
            "schedule.warmup_steps": 0,
            "schedule.decay_steps": None,
            "training.num_steps": NUM_STEPS,
            "training.order_steps": None,
            "training.stop_after_steps": None,
            "training.micro_batch_size": 1,
            "training.global_batch_size": num_microbatches * data_size,
            "training.recompute_layers": None,
            "checkpoint.initial_weights": None,
            "checkpoint.branch_from": None,
        }
    )
    small.check_world_size(world_size)
    return small


def one_process_version(small: RunConfig) -> RunConfig:
    """Return the run in one process, with Megatron-core's engine and without recomputation."""
    sections = {name: getattr(small, name) for name in RunConfig.model_fields}
    changed: dict[str, dict[str, Any]] = {
        "parallel": {},
        "deepspeed": {},
        "training": {"engine": "megatron", "recompute": "none", "recompute_modules": None},
        "optimizer": {"distributed": False},
    }
    for name, values in changed.items():
        section = type(sections[name])
        kept = {} if section in (ParallelConfig, DeepSpeedConfig) else sections[name].model_dump()
        sections[name] = section(**(kept | values))
    return RunConfig(**sections)


def _limit(size: int, limit: int, multiple: int) -> int:
    """Return a size of at most `limit`, or the next multiple above it, if the size exceeds it."""
    return size if size <= limit else min(size, math.ceil(limit / multiple) * multiple)
