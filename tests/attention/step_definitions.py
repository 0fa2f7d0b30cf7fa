"""Slow, obvious reference implementations of the steps of attention variants, for tests.

The taps of a convolution are computed one by one, and softmax is over a masked score matrix.
"""

from __future__ import annotations

import math

import torch

from tests.attention.modifier_definitions import Weights


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """max(x, 0), x·Φ(x) (arXiv 1606.08415), or x."""
    gelu = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return {"relu": x.clamp(min=0), "gelu": gelu, "none": x}[activation]


def simulate_heads(
    x_TND: torch.Tensor, weights: Weights, name: str, activation: str = "relu"
) -> torch.Tensor:
    """u[m, d] = b1[m] + Σ_n Σ_j W1[m, n, j]·x[n, d + j - (k-1)/2]; w = u + conv2(φ(u))."""
    prefix = f"simulation.heads.{name}."
    u = _convolve(x_TND, weights[prefix + "expand"], weights.get(prefix + "expand_bias"))
    activated = activate(u, activation)
    return u + _convolve(activated, weights[prefix + "refine"], weights.get(prefix + "refine_bias"))


def _convolve(x_TND: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    tokens, _, width = x_TND.shape
    taps = weight.shape[2]
    result = x_TND.new_zeros(tokens, weight.shape[0], width)
    for tap in range(taps):
        shift = tap - (taps - 1) // 2
        shifted = torch.zeros_like(x_TND)
        for feature in range(width):
            if 0 <= feature + shift < width:
                shifted[:, :, feature] = x_TND[:, :, feature + shift]
        result = result + torch.einsum("mn,tnd->tmd", weight[:, :, tap], shifted)
    return result if bias is None else result + bias[None, :, None]


def simulate_features(
    x_TMD: torch.Tensor, weights: Weights, name: str, activation: str = "relu"
) -> torch.Tensor:
    """y = x·A1ᵀ + a1 (D to E), z = y + φ(y)·A2ᵀ + a2 (E to E)."""
    prefix = f"simulation.features.{name}."

    def linear(x: torch.Tensor, part: str) -> torch.Tensor:
        bias = weights.get(f"{prefix}{part}_bias")
        product = torch.einsum("tmd,ed->tme", x, weights[prefix + part])
        return product if bias is None else product + bias

    y = linear(x_TMD, "expand")
    return y + linear(activate(y, activation), "refine")


def rotate(x_SBMD: torch.Tensor, rotary_dim: int, base: int = 10000) -> torch.Tensor:
    """Rotate the pairs (i, i + R/2) of the first R = `rotary_dim` features, with angles in float32."""
    if rotary_dim == 0:
        return x_SBMD
    positions = torch.arange(x_SBMD.shape[0], dtype=torch.float32)
    frequencies = 1.0 / (base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim))
    angles = torch.outer(positions, frequencies)
    cosine, sine = (
        torch.cat([part, part], dim=-1)[:, None, None, :].to(x_SBMD.dtype)
        for part in (angles.cos(), angles.sin())
    )
    rotary, rest = x_SBMD[..., :rotary_dim], x_SBMD[..., rotary_dim:]
    first, second = rotary.chunk(2, dim=-1)
    return torch.cat([rotary * cosine + torch.cat([-second, first], dim=-1) * sine, rest], dim=-1)


def rotate_neighbours(x_SBMR: torch.Tensor, base: int = 10000) -> torch.Tensor:
    """Rotate the pairs (2i, 2i + 1), with angles in float32, as DeepSeek does.

    The layer stores the rotated pairs as two halves, in queries and keys, which gives the same scores.
    """
    width = x_SBMR.shape[-1]
    positions = torch.arange(x_SBMR.shape[0], dtype=torch.float32)
    rotated = torch.empty_like(x_SBMR)
    for even in range(0, width, 2):
        frequency = 1.0 / (base ** (torch.tensor(even, dtype=torch.float32) / width))
        angle = (positions * frequency)[:, None, None]
        cosine, sine = angle.cos().to(x_SBMR.dtype), angle.sin().to(x_SBMR.dtype)
        first, second = x_SBMR[..., even], x_SBMR[..., even + 1]
        rotated[..., even] = first * cosine - second * sine
        rotated[..., even + 1] = first * sine + second * cosine
    return rotated


def attend(
    query_SBME: torch.Tensor, key_SBGE: torch.Tensor, value_SBGD: torch.Tensor, *, window: int | None = None
) -> torch.Tensor:
    """Return causal softmax attention [S, B, M, D], computed head by head with scale 1/√E.

    Within a window, query i attends to the keys i - window < j <= i, as in Mistral 7B (arXiv 2310.06825).
    """
    length, heads, width = query_SBME.shape[0], query_SBME.shape[2], query_SBME.shape[3]
    readers = heads // key_SBGE.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    forbidden = (distance < 0) | (distance >= (window or length))
    outputs = []
    for head in range(heads):
        query, key, value = (
            query_SBME[:, :, head],
            key_SBGE[:, :, head // readers],
            value_SBGD[:, :, head // readers],
        )
        scores = torch.einsum("sbe,tbe->bst", query, key) / math.sqrt(width)
        weights = scores.masked_fill(forbidden, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("bst,tbd->sbd", weights, value))
    return torch.stack(outputs, dim=2)


def attend_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: int, *, window: int | None = None
) -> list[torch.Tensor]:
    """Return the attention of each block of simulated heads."""
    return [
        attend(q, k, v, window=window)
        for q, k, v in zip(
            query.chunk(blocks, dim=2), key.chunk(blocks, dim=2), value.chunk(blocks, dim=2), strict=True
        )
    ]
