"""Shards of weights and logits of a model on ranks, and the full tensors that they form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout


@dataclass(frozen=True)
class WeightPart:
    """One parameter on one rank; `dim` is the sharded axis, None for a replicated parameter."""

    tensor: torch.Tensor
    dim: int | None
    num_matrices: int


def weight_parts(
    chunks: list[Any], value_of: Callable[[Any], torch.Tensor] = torch.detach
) -> dict[str, WeightPart]:
    """Return the parameters of a rank's model chunks by global name, or the results of `value_of`."""
    from sas_megatron.model.initialization import global_name

    parts = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            shared = getattr(parameter, "tensor_model_parallel", False)
            parts[global_name(chunk, name)] = WeightPart(
                value_of(parameter).clone(),
                parameter.partition_dim if shared else None,
                parameter.partition_stride if shared else 1,
            )
    return parts


def joined_weights(by_rank: list[dict[str, WeightPart]]) -> dict[str, torch.Tensor]:
    """Return full parameters from the tensor ranks' shards; replicas must be bit-identical."""
    full = {}
    for name, first in by_rank[0].items():
        parts = [parts[name].tensor for parts in by_rank]
        if first.dim is None:
            for rank, part in enumerate(parts):
                assert torch.equal(part, parts[0]), f"{name} differs between rank 0 and rank {rank}"
            full[name] = parts[0]
            continue
        # Each rank holds a shard of every matrix, such as the MLP's gate and up projections.
        matrices = zip(*(part.chunk(first.num_matrices, dim=first.dim) for part in parts), strict=True)
        full[name] = torch.cat([torch.cat(shares, dim=first.dim) for shares in matrices], dim=first.dim)
    return full


def initial_weights(config: RunConfig) -> dict[str, WeightPart]:
    """Return the parameters of a newly built model on this rank."""
    from sas_megatron.model.assembly import build_gpt_chunks

    in_layout(config.parallel)
    return weight_parts(build_gpt_chunks(config))


def random_tokens(config: RunConfig) -> torch.Tensor:
    """Return random tokens [B, S], equal on all ranks."""
    shape = (config.training.micro_batch_size, config.data.sequence_length)
    return torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def logits_part(config: RunConfig) -> torch.Tensor | None:
    """Return this rank's float64 logits [B, S, V/P]; None before the last stage."""
    from sas_megatron.model.assembly import build_gpt_chunks

    in_layout(config.parallel)
    chunks = build_gpt_chunks(config, dtype=torch.float64)
    for chunk in chunks:
        perturb_weights(chunk)
    return logits_part_of(chunks, config)


def logits_part_of(chunks: list[Any], config: RunConfig) -> torch.Tensor | None:
    """Return the logits of a rank's model chunks."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    topology = in_layout(config.parallel)
    tokens = random_tokens(config)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    local = token_positions(tokens.shape[1], topology.context_group.size())[topology.context_rank]

    def forward_step(_batches: Any, chunk: Any) -> Any:
        logits = chunk(tokens[:, local], positions[:, local], None)
        return logits, lambda output: (output.sum(), {"logits": output})

    with torch.no_grad():
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None] * len(chunks),
            model=chunks,
            num_microbatches=config.parallel.pipeline,
            seq_length=config.data.sequence_length,
            micro_batch_size=config.training.micro_batch_size,
            forward_only=True,
        )
    return reports[0]["logits"] if reports else None


def token_positions(length: int, context: int) -> list[torch.Tensor]:
    """Return the tokens of each context rank c: chunks c and 2C-1-c of 2C."""
    chunks = torch.arange(length).chunk(2 * context)
    return [torch.cat([chunks[rank], chunks[2 * context - 1 - rank]]) for rank in range(context)]


def joined_logits(by_rank: list[torch.Tensor | None], parallel: ParallelConfig) -> torch.Tensor:
    """Return full logits of one model copy; ranks are ordered by tensor, context, data, pipeline."""
    of_last_stage = [part for part in by_rank if part is not None]
    by_context = [
        torch.cat(of_last_stage[first : first + parallel.tensor], dim=-1)
        for first in range(0, parallel.tensor * parallel.context, parallel.tensor)
    ]
    order = torch.cat(token_positions(by_context[0].shape[1] * parallel.context, parallel.context))
    return torch.cat(by_context, dim=1)[:, order.argsort()]


@torch.no_grad()
def perturb_weights(model: Any) -> None:
    """Change the weights such that each affects the result, identically in every layout.

    Matrices from N(0, 0.02) keep scores, gates and ReLUs in their linear range, so they are scaled up. Noise
    is added to biases, which start at 0, to norms, which start at 1, and to matrices that start at 0.
    """
    from sas_megatron.model.initialization import global_name, shard_starts
    from sas_megatron.model.weight_stream import WeightStream

    for local_name, parameter in model.named_parameters():
        name = global_name(model, local_name)
        if ".simulation." in name:
            continue
        if parameter.dim() == 2 and parameter.any():
            parameter.mul_(8.0)
        else:
            noise = torch.empty_like(parameter)
            WeightStream(6, name).fill(noise, "normal", 0.3, starts=shard_starts(parameter))
            parameter.add_(noise)
