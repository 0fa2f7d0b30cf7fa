"""The layout of ranks that a checkpoint was saved by: only on the same one are dropout draws the same."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from sas_megatron.config.run import RunConfig

_DECIDED_BY = (
    "tensor",
    "sequence",
    "context",
    "pipeline",
    "virtual_pipeline",
    "first_stage_layers",
    "last_stage_layers",
)


def describe_layout(config: RunConfig) -> dict[str, Any]:
    """Of this run: what decides which rank draws for which tokens and layers."""
    world_size = dist.get_world_size()
    return {
        **{name: getattr(config.parallel, name) for name in _DECIDED_BY},
        "data": world_size // config.parallel.model_size,
        "world_size": world_size,
        "micro_batch_size": config.training.micro_batch_size,
    }


def name_differences(saved: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two layouts, such as `tensor 2 -> 4, data 2 -> 1`; empty where nothing does."""
    return ", ".join(
        f"{name} {saved.get(name)} -> {now.get(name)}"
        for name in dict.fromkeys([*saved, *now])
        if saved.get(name) != now.get(name)
    )
