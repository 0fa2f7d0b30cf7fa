"""The state of Megatron-core's AdamW by parameter, the same for all its optimizers.

Plain, mixed-precision and distributed optimizers keep their moments, and float32 weights where the
model's are bfloat16, each in another order; by parameter's name and place they are the same
numbers, so a checkpoint of one is good for the others, at any layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import nn

from sas_megatron.checkpoint.sharded_tensors import shard_parameter
from sas_megatron.checkpoint.tensor_reading import OPTIMIZER_PREFIX

MOMENTS = ("exp_avg", "exp_avg_sq")


def shard_optimizer(optimizer: Any, pieces: list[Any]) -> list[ShardedTensor]:
    """Moments, and float32 weights that are not the model's own, as views.

    Moments that no step has made yet are made, as zeros.
    """
    places = {parameter: (piece, name) for piece in pieces for name, parameter in piece.named_parameters()}
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    shards = []
    for parameter, main, first_element in _updated_parameters(optimizer):
        state = optimizer.optimizer.state[main]
        values = {name: state[name] for name in MOMENTS}
        if main.dtype != parameter.dtype:
            values["fp32_param"] = main.detach()
        for kind, tensor in values.items():
            shards += shard_parameter(
                *places[parameter],
                parameter,
                tensor,
                first_element=first_element,
                prefix=f"{OPTIMIZER_PREFIX}{kind}.",
            )
    return shards


def read_num_updates(optimizer: Any) -> int:
    """Updates that Adam's bias correction counts; the same for all parameters."""
    inner = optimizer.optimizer
    counts = {int(state["step"]) for state in inner.state.values() if "step" in state}
    # The fused implementations count by group.
    counts |= {int(group["step"]) for group in inner.param_groups if "step" in group}
    assert len(counts) <= 1, f"parameters were updated {counts} times"
    return max(counts, default=0)


def set_num_updates(optimizer: Any, num_updates: int) -> None:
    """Opposite of `read_num_updates`, once the moments are there."""
    inner = optimizer.optimizer
    if not isinstance(inner, torch.optim.Adam):  # AdamW is one
        for group in inner.param_groups:
            group["step"] = num_updates
        return
    for state in inner.state.values():
        # One for each parameter: torch counts them up in place.
        state["step"] = torch.tensor(float(num_updates))


def _updated_parameters(optimizer: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor, int]]:
    """The model's parameters with what AdamW updates for each: itself, a copy, or a run of its elements.

    The last is the element of the parameter that the run begins with.
    """
    inner = optimizer.optimizer
    if hasattr(optimizer, "model_param_group_index_map"):  # distributed
        for parameter, (group, place) in optimizer.model_param_group_index_map.items():
            run = optimizer._get_model_param_range_map(parameter)["param"]
            yield parameter, inner.param_groups[group]["params"][place], run.start
    elif hasattr(optimizer, "float16_groups"):  # mixed precision
        for models, mains in (
            (optimizer.float16_groups, optimizer.fp32_from_float16_groups),
            (optimizer.fp32_from_fp32_groups, optimizer.fp32_from_fp32_groups),
        ):
            for model_group, main_group in zip(models, mains, strict=True):
                for parameter, main in zip(model_group, main_group, strict=True):
                    yield parameter, main, 0
    else:
        for group in inner.param_groups:
            yield from ((parameter, parameter, 0) for parameter in group["params"])
