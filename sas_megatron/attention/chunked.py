"""Causal attention on a CPU by chunks of queries, as matrix products with the keys that a chunk attends to.

These are the keys up to the chunk's end, and within a window those from its first query's window on.

Forward and backward take two thirds of the time of torch's fused attention (two cores, 72 heads of 96/64
features, 512 tokens). Both skip the future half of the scores, but this one runs on the matrix library's
products and does not pad the value. It saves the attention weights for the backward pass, S²/2 per head, and
is therefore for short sequences or windows.
"""

from __future__ import annotations

from typing import Any

import torch

from sas_megatron.costs.attention_backend import first_key, query_chunks, uses_chunks


class _ChunkedAttention(torch.autograd.Function):
    """Computes softmax(scale·QKᵀ, causal)·V over Z = B·M heads."""

    @staticmethod
    def forward(
        ctx: Any,
        query_ZSE: torch.Tensor,
        key_ZSE: torch.Tensor,
        value_ZSD: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        batch, length, _ = query_ZSE.shape
        context = value_ZSD.new_empty(value_ZSD.shape)
        saved = []
        for start, end in query_chunks(length):
            first = first_key(start, window)
            scores = query_ZSE.new_empty(batch, end - start, end - first)
            scores = torch.baddbmm(
                scores, query_ZSE[:, start:end], key_ZSE[:, first:end].transpose(1, 2), beta=0, alpha=scale
            )
            future = scores.new_full((end - start, end - start), float("-inf")).triu(1)
            scores[:, :, start - first :] += future
            if window is not None:
                # Query start + i attends to no key before first_key(start + i).
                scores += scores.new_full(scores.shape[1:], float("-inf")).tril(start - first - window)
            weights = scores.softmax(dim=-1)
            context[:, start:end] = weights @ value_ZSD[:, first:end]
            if any(ctx.needs_input_grad):
                saved.append(weights)
        ctx.save_for_backward(query_ZSE, key_ZSE, value_ZSD, *saved)
        ctx.scale, ctx.window = scale, window
        return context

    @staticmethod
    def backward(
        ctx: Any, gradient_ZSD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query_ZSE, key_ZSE, value_ZSD, *saved = ctx.saved_tensors
        gradient_ZSD = gradient_ZSD.contiguous()
        query_gradient = torch.empty_like(query_ZSE)
        key_gradient, value_gradient = torch.zeros_like(key_ZSE), torch.zeros_like(value_ZSD)
        for (start, end), weights in zip(query_chunks(query_ZSE.shape[1]), saved, strict=True):
            gradient, keys = gradient_ZSD[:, start:end], slice(first_key(start, ctx.window), end)
            value_gradient[:, keys].baddbmm_(weights.transpose(1, 2), gradient)
            weights_gradient = gradient @ value_ZSD[:, keys].transpose(1, 2)
            scores_gradient = torch._softmax_backward_data(weights_gradient, weights, -1, weights.dtype)
            query_gradient[:, start:end] = (scores_gradient @ key_ZSE[:, keys]).mul_(ctx.scale)
            key_gradient[:, keys].baddbmm_(
                scores_gradient.transpose(1, 2), query_ZSE[:, start:end], alpha=ctx.scale
            )
        return query_gradient, key_gradient, value_gradient, None, None


def supports_chunks(
    query_BMSE: torch.Tensor, key_BGSE: torch.Tensor, *, dropout: float, window: int | None = None
) -> bool:
    """Return whether `attend_chunked` supports these inputs and is faster than fused attention."""
    return uses_chunks(
        device="cpu" if query_BMSE.device.type == "cpu" else "gpu",
        dropout=dropout,
        is_wide=query_BMSE.dtype in (torch.float32, torch.float64),
        is_paired=query_BMSE.shape[:3] == key_BGSE.shape[:3],
        length=query_BMSE.shape[2],
        window=window,
    )


def attend_chunked(
    query_BMSE: torch.Tensor,
    key_BMSE: torch.Tensor,
    value_BMSD: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Return causal attention as [B, M, S, D], stored as [S, B, M, D], which the next operation reads.

    Args:
        query_BMSE: Queries.
        key_BMSE: Keys.
        value_BMSD: Values.
        scale: Factor of the scores.
        window: Number of keys that a query attends to, the last of which is its own; None for all.
    """
    batch = query_BMSE.shape[0]
    # Views of Megatron-core's layout: [S, B·M, E] seen as [B·M, S, E].
    query, key, value = (
        heads.permute(2, 0, 1, 3).flatten(1, 2).transpose(0, 1)
        for heads in (query_BMSE, key_BMSE, value_BMSD)
    )
    context_ZSD = _ChunkedAttention.apply(query, key, value, scale, window)
    context: torch.Tensor = context_ZSD.unflatten(0, (batch, -1))
    return context
