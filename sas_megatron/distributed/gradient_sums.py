"""Gradients of weights that every tensor rank holds while each sees a part of the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class _SumGradients(torch.autograd.Function):
    """Identity forward; backward adds the gradients up over a group, in one all-reduce."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(True)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, *sum_over(ctx.group, gradients))


def sum_over(group: dist.ProcessGroup, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients added up over a group, in one all-reduce; those given stay as they are.

    Partial sums are added in float32, as Megatron-core accumulates all gradients.
    """
    accumulate = torch.promote_types(gradients[0].dtype, torch.float32)
    flat = torch.cat([gradient.reshape(-1).to(accumulate) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    pieces = flat.split([gradient.numel() for gradient in gradients])
    return [
        piece.view_as(gradient).to(gradient.dtype) for piece, gradient in zip(pieces, gradients, strict=True)
    ]


def sum_gradients_over(group: dist.ProcessGroup, weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same weights, whose gradients will be summed over `group` in the backward pass.

    For weights that are replicated over the group while each rank computes with a part of the
    heads or tokens: every rank's gradient is then a partial sum. Doing it in the layer makes the
    sum exact under every engine, with no hook in any; it costs one all-reduce a layer and
    microbatch, of 2·(P-1)/P float32 elements sent for each parameter (ring convention).
    """
    if group.size() == 1:
        return tuple(weights)
    return tuple(_SumGradients.apply(group, *weights))
