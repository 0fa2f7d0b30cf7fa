"""The state of Megatron-core's AdamW by parameter, in one form for all of its optimizers.

The plain, mixed-precision and distributed optimizers store their moments, and float32 weights if the model's
weights are bfloat16, in different orders. Stored by parameter name and element index the values are the same,
so that a checkpoint of one optimizer can be loaded into another, at any layout.
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


def shard_optimizer(optimizer: Any, model_chunks: list[Any]) -> list[ShardedTensor]:
    """Return views of the moments, and of the float32 weights if the model's weights have another dtype.

    Moments that do not exist before the first step are created as zeros.
    """
    names = {
        parameter: (chunk, name) for chunk in model_chunks for name, parameter in chunk.named_parameters()
    }
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    shards = []
    for parameter, main, first_element in updated_parameters(optimizer):
        state = optimizer.optimizer.state[main]
        values = {name: state[name] for name in MOMENTS}
        if main.dtype != parameter.dtype:
            values["fp32_param"] = main.detach()
        for kind, tensor in values.items():
            shards += shard_parameter(
                *names[parameter],
                parameter,
                tensor,
                first_element=first_element,
                prefix=f"{OPTIMIZER_PREFIX}{kind}.",
            )
    return shards


def read_num_updates(optimizer: Any) -> int:
    """Return the number of updates that Adam's bias correction uses; it is the same for all parameters."""
    inner = optimizer.optimizer
    steps = [state["step"] for state in inner.state.values() if "step" in state]
    counts = set(map(int, torch.stack(steps).tolist())) if steps else set()  # one read for all parameters
    # The fused implementations store it per group.
    counts |= {int(group["step"]) for group in inner.param_groups if "step" in group}
    assert len(counts) <= 1, f"parameters have different numbers of updates: {counts}"
    return max(counts, default=0)


def set_num_updates(optimizer: Any, num_updates: int) -> None:
    """Set the number that `read_num_updates` returns; the moments must exist."""
    inner = optimizer.optimizer
    if not isinstance(inner, torch.optim.Adam):  # torch's AdamW is a subclass
        for group in inner.param_groups:
            group["step"] = num_updates
        return
    for parameter, state in inner.state.items():
        # Each parameter needs its own tensor, because torch increments it in place. Fused AdamW reads it on
        # the device.
        state["step"] = torch.tensor(float(num_updates), device=parameter.device)


def updated_parameters(optimizer: Any) -> Iterator[tuple[nn.Parameter, torch.Tensor, int]]:
    """Yield each parameter of the model, the tensor that AdamW updates for it, and a first element.

    The tensor is the parameter itself, a float32 copy, or a contiguous range of the parameter's elements. The
    first element is the index in the parameter at which that range begins.
    """
    inner = optimizer.optimizer
    if hasattr(optimizer, "model_param_group_index_map"):  # distributed
        for parameter, (group, index) in optimizer.model_param_group_index_map.items():
            elements = optimizer._get_model_param_range_map(parameter)["param"]
            yield parameter, inner.param_groups[group]["params"][index], elements.start
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
