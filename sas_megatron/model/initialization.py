"""Initial weights that do not depend on the layout.

Each parameter is drawn whole, on the CPU, by a generator seeded with (seed, global name), and each
rank keeps its part. Megatron-core draws in the order in which modules are built, which differs
between layouts.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.parallel_state import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from torch import nn

from sas_megatron.attention.sas.residual_map import ResidualMap
from sas_megatron.config.attention import InitialWeights
from sas_megatron.config.run import RunConfig

_LAYERS = "decoder.layers."


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """The generator of one parameter, by the run's seed and the parameter's global name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _generator_in(seed: int, module_name: str, name: str) -> torch.Generator:
    return parameter_generator(seed, f"{module_name}.{name}")


def initialize_weights(model: nn.Module, config: RunConfig) -> None:
    """Draws all weights of this rank's part of the model in place.

    Matrices from N(0, σ), σ = `model.init_std`; those that end a residual branch from
    N(0, σ/√(2·layers)) (Radford et al. 2019, GPT-2); norms 1, biases 0; the simulation as
    `attention.initialization` says, and other weights of the attention as `initial_weights` does.
    """
    _initialize(model, config, functools.partial(global_name, model))


def initialize_layer(layer: Any, config: RunConfig) -> None:
    """The same for one transformer layer, by its number, in a model that is built elsewhere."""
    prefix = f"{_LAYERS}{layer.layer_number - 1}."
    _initialize(layer, config, lambda name: prefix + name)


@torch.no_grad()
def _initialize(part: nn.Module, config: RunConfig, name_of: Callable[[str], str]) -> None:
    drawn = initialize_simulation(part, config, name_of=name_of)
    for name, parameter in part.named_parameters():
        if parameter not in drawn:
            _initialize_parameter(name_of(name), parameter, config)


def initialize_simulation(
    module: nn.Module, config: RunConfig, *, name_of: Callable[[str], str]
) -> set[nn.Parameter]:
    """Draws the weights of all simulations in a module, and returns them.

    Args:
        module: A model, or a part of one.
        config: The run.
        name_of: Gives the global name of a module by its name within `module`.
    """
    drawn: set[nn.Parameter] = set()
    for own_name, part in module.named_modules():
        if isinstance(part, ResidualMap):
            part.initialize(
                config.attention.initialization,  # type: ignore[attr-defined]  # only SAS has such modules
                config.model.init_std,
                functools.partial(_generator_in, config.training.seed, name_of(own_name)),
            )
            drawn.update(part.parameters())
    return drawn


def global_name(model: Any, name: str) -> str:
    """A name within this rank's part -> the name in a whole model of one part.

    Layers are counted from the model's first in place of the part's, and where the last stage keeps
    a copy of the input embedding as its output layer, that goes by the embedding's name.
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
        shape = whole_shape(parameter)
        initial = _initial_weights(name, tuple(shape), config)
        generator = parameter_generator(config.training.seed, name)
        if initial.distribution == "normal":
            whole = torch.empty(shape).normal_(0.0, initial.scale, generator=generator)
        else:
            whole = torch.empty(shape).uniform_(-initial.scale, initial.scale, generator=generator)
        parameter.copy_(tensor_parallel_part(whole, parameter))


def _initial_weights(name: str, whole_shape: tuple[int, ...], config: RunConfig) -> InitialWeights:
    _, in_attention, own_name = name.partition(".self_attention.")
    chosen = config.attention.initial_weights(own_name, whole_shape) if in_attention else None
    if chosen is not None:
        return chosen
    ends_branch = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    narrowing = math.sqrt(2 * config.model.num_layers) if ends_branch else 1.0
    return InitialWeights("normal", config.model.init_std / narrowing)


def whole_shape(parameter: nn.Parameter) -> list[int]:
    """Shape of the parameter over all tensor ranks."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= get_tensor_model_parallel_world_size()  # type: ignore[attr-defined]
    return shape


def tensor_parallel_part(whole: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of `whole`, as Megatron-core lays `parameter` out.

    A stride of s (the MLP's gate and up projections: 2) means that the whole is s pieces and each
    rank holds a part of every piece.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    dim, stride = parameter.partition_dim, parameter.partition_stride  # type: ignore[attr-defined]
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    pieces = whole.chunk(stride, dim=dim)
    return torch.cat([piece.chunk(ranks, dim=dim)[rank] for piece in pieces], dim=dim)
