"""Initial weights that do not depend on the layout.

Each rank draws its shard of a parameter from the parameter's own stream of random numbers, at the positions
of the shard in the full parameter. Megatron-core draws in the order in which it builds modules, which differs
between layouts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from torch import nn

from sas_megatron.attention.sas.simulated_attention import ResidualMap
from sas_megatron.config.attention import InitialWeights
from sas_megatron.config.run import RunConfig
from sas_megatron.model.weight_stream import WeightStream

_LAYERS = "decoder.layers."
_MODIFIERS = "core_attention.modifiers."
# Knocking heads start as the identity, 2·σ(0) = 1 (Zhou et al. 2025, arXiv 2510.23052, section 3.3). Output
# gates start like other matrices, as in Megatron-core, where they are rows of the fused projection.
_MODIFIER_WEIGHTS = {
    "knocking.up": InitialWeights("identity", 1.0),
    "knocking.gate": InitialWeights("normal", 0.0),
    "knocking.down": InitialWeights("identity", 1.0),
}


def initialize_weights(model: nn.Module, config: RunConfig) -> None:
    """Draw all weights of a model chunk in place.

    Matrices are drawn from N(0, σ) with σ = `model.init_std`, and those at the end of a residual branch by
    `model.output_init`: from N(0, σ/√(2·layers)) (Radford et al. 2019, GPT-2), from N(0, 2/(layers·√H))
    (Wang and Komatsuzaki 2021, GPT-J; `wang_init` of GPT-NeoX), or from N(0, σ) as well. Norms are 1 and
    biases 0. The simulation follows `attention.initialization`, the modifiers of attention
    `_MODIFIER_WEIGHTS`, and other weights of the attention `AttentionConfig.initial_weights`.
    """
    _initialize(model, config, functools.partial(global_name, model))


def initialize_layer(layer: Any, config: RunConfig) -> None:
    """Draw the weights of one transformer layer, by its number, in a model that is built elsewhere."""
    prefix = f"{_LAYERS}{layer.layer_number - 1}."
    _initialize(layer, config, lambda name: prefix + name)


@torch.no_grad()
def _initialize(module: nn.Module, config: RunConfig, name_of: Callable[[str], str]) -> None:
    drawn = initialize_simulation(module, config, name_of=name_of)
    for name, parameter in module.named_parameters():
        if parameter not in drawn:
            _initialize_parameter(name_of(name), parameter, config)


def initialize_simulation(
    module: nn.Module, config: RunConfig, *, name_of: Callable[[str], str]
) -> set[nn.Parameter]:
    """Draw the weights of all simulations in a module, and return these weights.

    Args:
        module: A model, or a part of one.
        config: The run.
        name_of: Returns the global name of a submodule, given its name in `module`.
    """
    drawn: set[nn.Parameter] = set()
    for local_name, part in module.named_modules():
        if isinstance(part, ResidualMap):
            part.initialize(
                config.attention.initialization,  # type: ignore[attr-defined]  # only SAS has such modules
                functools.partial(_draw, config.training.seed, name_of(local_name)),
            )
            drawn.update(part.parameters())
    return drawn


def _draw(seed: int, module_name: str, name: str, distribution: str, scale: float, out: torch.Tensor) -> None:
    WeightStream(seed, f"{module_name}.{name}").fill(out, distribution, scale)


def global_name(model: Any, name: str) -> str:
    """Return the name in the full model of a parameter or module of this rank's model chunk.

    Layers are numbered from the first layer of the model. The last stage's copy of a tied input embedding has
    the name of the embedding.
    """
    part, _, rest = name.removeprefix(_LAYERS).partition(".")
    if name.startswith(_LAYERS):
        return f"{_LAYERS}{model.decoder.layers[int(part)].layer_number - 1}.{rest}"
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    return name


def _initialize_parameter(name: str, parameter: nn.Parameter, config: RunConfig) -> None:
    if name.endswith("bias"):
        parameter.zero_()
    elif parameter.dim() == 1:
        parameter.fill_(1.0)
    else:
        shape = full_shape(parameter)
        initial = _initial_weights(name, tuple(shape), config)
        if initial.distribution == "identity":
            parameter.copy_(tensor_parallel_shard(initial.scale * torch.eye(*shape), parameter))
        else:
            stream = WeightStream(config.training.seed, name)
            stream.fill(parameter, initial.distribution, initial.scale, starts=shard_starts(parameter))


def _initial_weights(name: str, full_shape: tuple[int, ...], config: RunConfig) -> InitialWeights:
    _, is_attention, local_name = name.partition(".self_attention.")
    if local_name.startswith(_MODIFIERS):
        initial = _MODIFIER_WEIGHTS.get(local_name.removeprefix(_MODIFIERS))
    else:
        initial = config.attention.initial_weights(local_name, full_shape) if is_attention else None
    if initial is not None:
        return initial
    model = config.model
    ends_branch = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    if not ends_branch or model.output_init == "normal":
        return InitialWeights("normal", model.init_std)
    if model.output_init == "wang":
        return InitialWeights("normal", 2 / (model.num_layers * math.sqrt(model.hidden_size)))
    return InitialWeights("normal", model.init_std / math.sqrt(2 * model.num_layers))


def full_shape(parameter: nn.Parameter) -> list[int]:
    """Return the shape of a parameter over all tensor ranks."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= get_tensor_model_parallel_world_size()  # type: ignore[attr-defined]
    return shape


def tensor_parallel_shard(full: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Return this rank's shard of a full tensor, in Megatron-core's layout of `parameter`."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    parts = [full.narrow(dim, part.start, len(part)) for part in _local_indices(parameter)]
    return torch.cat(parts, dim=dim)


def shard_starts(parameter: nn.Parameter) -> list[int]:
    """Return where the contiguous runs of this rank's shard start in the flattened full parameter.

    All runs have the same length.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return [0]
    dim = parameter.partition_dim  # type: ignore[attr-defined]
    outer, (size, *inner) = math.prod(parameter.shape[:dim]), full_shape(parameter)[dim:]
    return [
        (row * size + part.start) * math.prod(inner)
        for row in range(outer)
        for part in _local_indices(parameter)
    ]


def _local_indices(parameter: nn.Parameter) -> list[range]:
    """Return the indices of this rank's shard along the sharded dimension of the full parameter.

    A stride of s (2 for the MLP's gate and up projections) means that the tensor consists of s matrices, each
    of which is sharded over the ranks.
    """
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    length = parameter.shape[dim] // stride
    return [
        range(first, first + length)
        for first in range(rank * length, stride * ranks * length, ranks * length)
    ]
