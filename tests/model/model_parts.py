"""A model on ranks: its parts of weights and logits, and the whole that they join to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout


@dataclass(frozen=True)
class WeightPart:
    """One parameter on one rank; `dim` is the axis that is shared out, None where it is replicated."""

    tensor: torch.Tensor
    dim: int | None
    num_pieces: int


def weight_parts(model: Any) -> dict[str, WeightPart]:
    """All parameters of a rank's model by name, as Megatron-core lays them out."""
    parts = {}
    for name, parameter in model.named_parameters():
        shared = getattr(parameter, "tensor_model_parallel", False)
        parts[name] = WeightPart(
            parameter.detach().clone(),
            parameter.partition_dim if shared else None,
            parameter.partition_stride if shared else 1,
        )
    return parts


def joined_weights(by_rank: list[dict[str, WeightPart]]) -> dict[str, torch.Tensor]:
    """Whole parameters from the tensor ranks' parts; replicas must be equal to the bit."""
    whole = {}
    for name, first in by_rank[0].items():
        parts = [parts[name].tensor for parts in by_rank]
        if first.dim is None:
            for rank, part in enumerate(parts):
                assert torch.equal(part, parts[0]), f"{name} differs between rank 0 and rank {rank}"
            whole[name] = parts[0]
            continue
        # Each rank holds its share of every piece: of the MLP's gate and of its up projection, say.
        pieces = zip(*(part.chunk(first.num_pieces, dim=first.dim) for part in parts), strict=True)
        whole[name] = torch.cat([torch.cat(shares, dim=first.dim) for shares in pieces], dim=first.dim)
    return whole


def initial_weights(config: RunConfig) -> dict[str, WeightPart]:
    """On a rank: the parameters of the freshly built model."""
    from sas_megatron.model.assembly import build_gpt

    in_layout(config.parallel)
    return weight_parts(build_gpt(config))


def random_tokens(config: RunConfig) -> torch.Tensor:
    """[B, S], the same on every rank."""
    shape = (config.training.micro_batch_size, config.data.sequence_length)
    return torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def logits_part(config: RunConfig) -> torch.Tensor:
    """On a rank: float64 logits of its part of the vocabulary, [B, S, V/P]."""
    from sas_megatron.model.assembly import build_gpt

    in_layout(config.parallel)
    model = build_gpt(config, dtype=torch.float64)
    _roughen_weights(model)
    tokens = random_tokens(config)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)


@torch.no_grad()
def _roughen_weights(model: Any) -> None:
    """Gives every weight a part in the result, the same at every layout.

    Matrices from N(0, 0.02) leave scores, gates and ReLUs in their linear range, so they are scaled
    up; biases start at 0 and norms at 1, so noise is added.
    """
    from sas_megatron.model.initialization import parameter_generator, tensor_parallel_part, whole_shape

    for name, parameter in model.named_parameters():
        if ".simulation." in name:
            continue
        if parameter.dim() == 2:
            parameter.mul_(8.0)
        else:
            noise = torch.randn(whole_shape(parameter), generator=parameter_generator(6, name))
            parameter.add_(0.3 * tensor_parallel_part(noise, parameter))
