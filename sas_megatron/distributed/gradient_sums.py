"""Gradient sums for weights that are replicated over the tensor-parallel group.

Each tensor rank computes with only some of the heads or tokens, so the gradient of a replicated weight is a
partial sum on each rank. Two cases:

- **SAS head and feature simulation** (`sum_gradients_over`): the gradients are summed by the layer itself.
- **Shared columns** of TPA and MFA: every rank's heads read the same columns, which each rank computes for
  its own tokens. Under sequence parallelism a rank has 1/P of the tokens: `gather_shared_columns` all-gathers
  the columns, and `sum_gradients_over_tokens` sums the weight gradients. Without it each rank has all tokens,
  and only the gradient of the columns must be summed; the weight gradients are then complete and equal on all
  ranks. (Gathering the hidden states first and multiplying afterwards would repeat the full product on every
  rank.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


class _SumGradients(torch.autograd.Function):
    """Identity in forward, all-reduce in backward (one for all weights)."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(True)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *all_reduce_gradients(ctx.group, gradients))


def all_reduce_gradients(group: dist.ProcessGroup, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients summed over `group` in one all-reduce, without changing the arguments.

    The sum is taken in float32 or higher, as Megatron-core accumulates all gradients.
    """
    accumulate = torch.promote_types(gradients[0].dtype, torch.float32)
    flat = torch.cat([gradient.reshape(-1).to(accumulate) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    sums = flat.split([gradient.numel() for gradient in gradients])
    return [
        summed.view_as(gradient).to(gradient.dtype) for summed, gradient in zip(sums, gradients, strict=True)
    ]


def sum_gradients_over(group: dist.ProcessGroup, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the weights unchanged, and sum their gradients over `group` in the backward pass.

    Identity in forward, all-reduce in backward. Use it for weights that are replicated over the group while
    each rank computes with only some of the heads or tokens. Summing in the layer makes the gradient exact
    under every training engine without a hook in any of them. It costs one all-reduce per layer and
    microbatch, in which each rank sends 2·(P-1)/P float32 elements per parameter (ring convention).
    """
    if group.size() == 1:
        return tuple(weights)
    return tuple(_SumGradients.apply(group, *weights))


def sum_gradients_over_tokens(
    weights: Sequence[torch.Tensor], *, group: dist.ProcessGroup, sequence_parallel: bool
) -> tuple[torch.Tensor, ...]:
    """Return replicated weights to apply to local tokens, with their gradients summed over the ranks' tokens.

    Under sequence parallelism: identity in forward, all-reduce in backward. Otherwise every rank has all
    tokens, and there is nothing to sum.
    """
    return sum_gradients_over(group, weights) if sequence_parallel else tuple(weights)


def gather_shared_columns(
    columns: torch.Tensor, *, group: dist.ProcessGroup, sequence_parallel: bool
) -> torch.Tensor:
    """Return the columns of all tokens, [S, B, W], for the heads of this rank.

    Under sequence parallelism the argument is [S/P, B, W]: all-gather in forward, reduce-scatter in backward.
    Otherwise it is [S, B, W]: identity in forward, all-reduce in backward. Either way the gradients from the
    heads of all ranks are summed.
    """
    gathered: torch.Tensor = (
        gather_from_sequence_parallel_region(columns, group=group)
        if sequence_parallel
        else copy_to_tensor_model_parallel_region(columns, group=group)
    )
    return gathered
