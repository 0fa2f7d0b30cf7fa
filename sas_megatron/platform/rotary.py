"""Rotary positions in one pass over the tensor, where TransformerEngine's kernel is absent.

Megatron-core's own unfused form makes six intermediate tensors of the query's size, forward and
again backward; on CPU that is a sixth of a SAS block's time.
"""

from __future__ import annotations

from typing import Any

import torch


class _RotateHalves(torch.autograd.Function):
    """Turns the pairs (i, i + R/2) of the first R features; its gradient is the turn back."""

    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(heads, cosine, sine)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turn(gradient, cosine, -sine), None, None


def _turn(heads: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    half = cosine.shape[-1]
    turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    first, second = heads[..., :half], heads[..., half : 2 * half]
    torch.mul(first, cosine, out=turned[..., :half])
    turned[..., :half].addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=turned[..., half : 2 * half])
    turned[..., half : 2 * half].addcmul_(first, sine)
    turned[..., 2 * half :] = heads[..., 2 * half :]
    return turned


def rotate_halves(heads: torch.Tensor, angles: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Rotary positions, as Megatron-core calls its fused form.

    Args:
        heads: [S, B, heads, D].
        angles: [S, 1, 1, R] with R ≤ D, both halves equal, in float32.
        interleaved: Pairs of neighbours in place of halves; not offered.
    """
    if interleaved:
        raise NotImplementedError("interleaved rotary pairs need TransformerEngine")
    half = angles[..., : angles.shape[-1] // 2]
    turned: torch.Tensor = _RotateHalves.apply(heads, half.cos().to(heads.dtype), half.sin().to(heads.dtype))
    return turned


def offer_fused_rotary() -> None:
    """Gives Megatron-core `rotate_halves` for `apply_rope_fusion`, where it has no kernel for that."""
    from megatron.core.models.common.embeddings import rope_utils

    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = rotate_halves
