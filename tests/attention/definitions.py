"""Slow, obvious reference implementations of the attention variants, for tests.

Every step follows the paper's equations. For SAS, the taps of the convolution are computed one by one, and
every block of heads passes through the projection before the average. Softmax is over a masked score matrix.
Weights are full tensors, named as in the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sas_megatron.attention.mfa.config import FactorizedAttentionConfig
from sas_megatron.attention.mla.config import LatentAttentionConfig
from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.tpa.config import TensorProductAttentionConfig
from sas_megatron.config.attention import AttentionConfig

Weights = Mapping[str, torch.Tensor]


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


def attend(query_SBME: torch.Tensor, key_SBGE: torch.Tensor, value_SBGD: torch.Tensor) -> torch.Tensor:
    """Return causal softmax attention [S, B, M, D], computed head by head with scale 1/√E."""
    length, heads, width = query_SBME.shape[0], query_SBME.shape[2], query_SBME.shape[3]
    readers = heads // key_SBGE.shape[2]
    forbidden = torch.ones(length, length, dtype=torch.bool).triu(1)
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


def grouped_attention(
    hidden_SBH: torch.Tensor, weights: Weights, config: AttentionConfig, *, rotary: bool = True
) -> torch.Tensor:
    """Grouped-query attention and SAS: project, simulate, rotate, attend, project each block, aggregate."""
    length, batch, _ = hidden_SBH.shape
    heads, groups, width = config.num_heads, config.num_key_value_heads, config.head_dim
    columns = hidden_SBH @ weights["linear_qkv.weight"].T
    # Megatron-core keeps each group's queries, key and value together.
    grouped = columns.view(length * batch, groups, heads // groups + 2, width)
    base = {
        "query": grouped[:, :, :-2].reshape(length * batch, heads, width),
        "key": grouped[:, :, -2],
        "value": grouped[:, :, -1],
    }
    blocks, divisor = 1, 1.0
    if rotary and config.rotary == "before":
        rotary = False
        for name in ("query", "key"):
            base[name] = rotate(base[name].view(length, batch, -1, width), config.rotary_width).flatten(0, 1)
    if isinstance(config, SimulatedAttentionConfig):
        blocks = config.head_expansion
        divisor = {"mean": blocks, "rsqrt": math.sqrt(blocks)}[config.aggregation]
        switches = config.head_simulations()
        for name, x_TND in base.items():
            is_on, activation = name in switches, config.head_activation
            base[name] = (
                simulate_heads(x_TND, weights, name, activation) if is_on else x_TND.repeat(1, blocks, 1)
            )
        if config.simulate_features:
            for name in ("query", "key"):
                base[name] = simulate_features(base[name], weights, name, config.feature_activation)
    query, key, value = (x.view(length, batch, *x.shape[1:]) for x in base.values())
    if rotary:
        query, key = rotate(query, config.rotary_width), rotate(key, config.rotary_width)
    context = attend_blocks(query, key, value, blocks)
    projected = [block.flatten(2) @ weights["linear_proj.weight"].T for block in context]
    return torch.stack(projected).sum(dim=0) / divisor


def attend_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: int
) -> list[torch.Tensor]:
    """Return the attention of each block of simulated heads."""
    return [
        attend(q, k, v)
        for q, k, v in zip(
            query.chunk(blocks, dim=2), key.chunk(blocks, dim=2), value.chunk(blocks, dim=2), strict=True
        )
    ]


def latent_attention(
    hidden_SBH: torch.Tensor, weights: Weights, config: LatentAttentionConfig
) -> torch.Tensor:
    """Multi-head latent attention, equations 9 to 19 and 37 to 47 of arXiv 2405.04434, head by head.

    c^KV = W^DKV·h, k^C = W^UK·c, v^C = W^UV·c, c^Q = W^DQ·h, q^C = W^UQ·c^Q, with RMSNorms on the latents;
    q^R = RoPE(W^QR·c^Q), k^R = RoPE(W^KR·h), one for all heads; [q^C; q^R]·[k^C; k^R] / √(D + R).
    As in the layer, one matrix has the rows of W^DKV and W^KR, one has each head's W^UQ and W^QR, and one has
    each head's W^UK and W^UV.
    """
    compressed = config.query_lora_rank is not None
    query_latent = hidden_SBH
    if compressed:
        query_latent = root_mean_square_norm(
            hidden_SBH @ weights["linear_q_down_proj.weight"].T, weights["q_layernorm.weight"]
        )
    query_up = weights["linear_q_up_proj.weight" if compressed else "linear_q_proj.weight"]
    down = weights["linear_kv_down_proj.weight"]
    latent = hidden_SBH @ down[: config.kv_lora_rank].T
    latent = root_mean_square_norm(latent, weights["kv_layernorm.weight"])
    rotated: Callable[..., torch.Tensor] = rotate_neighbours if config.rotary == "after" else lambda x: x
    rotary_key = rotated((hidden_SBH @ down[config.kv_lora_rank :].T)[:, :, None])
    queries, keys, values = [], [], []
    for of_query, of_key_value in zip(
        query_up.chunk(config.num_heads),
        weights["linear_kv_up_proj.weight"].chunk(config.num_heads),
        strict=True,
    ):
        query = query_latent @ of_query.T
        rotary_query = rotated(query[:, :, None, config.head_dim :])[:, :, 0]
        queries.append(torch.cat([query[:, :, : config.head_dim], rotary_query], dim=-1))
        key, value = of_key_value[: config.head_dim], of_key_value[config.head_dim :]
        keys.append(torch.cat([latent @ key.T, rotary_key[:, :, 0]], dim=-1))
        values.append(latent @ value.T)
    context = attend(*(torch.stack(heads, dim=2) for heads in (queries, keys, values)))
    return context.flatten(2) @ weights["linear_proj.weight"].T


def root_mean_square_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-5) -> torch.Tensor:
    """x / √(mean x² + ε) · weight."""
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


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


def latent_weight_shapes(config: LatentAttentionConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the full shapes of the layer's weights, by name."""
    heads, latent, rank = config.num_heads, config.kv_lora_rank, config.query_lora_rank
    query_width = heads * (config.head_dim + config.rotary_head_dim)
    shapes: dict[str, tuple[int, ...]] = {
        "linear_kv_down_proj.weight": (latent + config.rotary_head_dim, hidden_size),
        "kv_layernorm.weight": (latent,),
        "linear_kv_up_proj.weight": (heads * (config.head_dim + config.value_width), latent),
        "linear_proj.weight": (hidden_size, heads * config.value_width),
    }
    if rank is None:
        return {**shapes, "linear_q_proj.weight": (query_width, hidden_size)}
    return {
        **shapes,
        "linear_q_down_proj.weight": (rank, hidden_size),
        "q_layernorm.weight": (rank,),
        "linear_q_up_proj.weight": (query_width, rank),
    }


def grouped_weight_shapes(config: AttentionConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the full shapes of the layer's weights, by name."""
    heads, groups, width = config.num_heads, config.num_key_value_heads, config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "linear_qkv.weight": ((heads + 2 * groups) * width, hidden_size),
        "linear_proj.weight": (hidden_size, heads * width),
    }
    if not isinstance(config, SimulatedAttentionConfig):
        return shapes
    for name, base in config.head_simulations().items():
        many, prefix = config.head_expansion * base, f"simulation.heads.{name}."
        shapes[prefix + "expand"] = (many, base, config.kernel_size)
        shapes[prefix + "refine"] = (many, many, config.kernel_size)
        if config.simulation_bias:
            shapes[prefix + "expand_bias"] = shapes[prefix + "refine_bias"] = (many,)
    for name in ("query", "key") if config.simulate_features else ():
        wide, prefix = config.query_key_dim, f"simulation.features.{name}."
        shapes[prefix + "expand"], shapes[prefix + "refine"] = (wide, width), (wide, wide)
        if config.simulation_bias:
            shapes[prefix + "expand_bias"] = shapes[prefix + "refine_bias"] = (wide,)
    return shapes


def tensor_product_attention(
    hidden_SBH: torch.Tensor, weights: Weights, config: TensorProductAttentionConfig
) -> torch.Tensor:
    """T6: Q = (1/R) Σ_r a_r(x) ⊗ b_r(x) for each token, K and V likewise; b of Q and K is rotated."""
    length, batch, _ = hidden_SBH.shape
    heads, width = config.num_heads, config.head_dim
    heads_by_name = {}
    for name in ("query", "key", "value"):
        of_heads = hidden_SBH @ weights[f"linear_qkv.heads.{name}"].T
        if name == "query" and not config.factorize_query:
            heads_by_name[name] = rotate(of_heads.view(length, batch, heads, width), config.rotary_width)
            continue
        rank = {"query": config.query_rank or 6, "key": config.key_rank, "value": config.value_rank}[name]
        a_SBNR = of_heads.view(length, batch, heads, rank)
        b_SBRD = (hidden_SBH @ weights[f"linear_qkv.features.{name}"].T).view(length, batch, rank, width)
        if name != "value":
            b_SBRD = rotate(b_SBRD, config.rotary_width)
        total = hidden_SBH.new_zeros(length, batch, heads, width)
        for r in range(rank):
            total = total + torch.einsum("sbn,sbd->sbnd", a_SBNR[..., r], b_SBRD[:, :, r])
        heads_by_name[name] = total / rank
    context = attend(heads_by_name["query"], heads_by_name["key"], heads_by_name["value"])
    return context.flatten(2) @ weights["linear_proj.weight"].T


def tensor_product_weight_shapes(
    config: TensorProductAttentionConfig, hidden_size: int
) -> dict[str, tuple[int, ...]]:
    """Return the full shapes of the layer's weights, by name."""
    heads, width = config.num_heads, config.head_dim
    ranks = {"query": config.query_rank or 6, "key": config.key_rank, "value": config.value_rank}
    shapes: dict[str, tuple[int, ...]] = {"linear_proj.weight": (hidden_size, heads * width)}
    for name, rank in ranks.items():
        if name == "query" and not config.factorize_query:
            shapes["linear_qkv.heads.query"] = (heads * width, hidden_size)
            continue
        shapes[f"linear_qkv.heads.{name}"] = (heads * rank, hidden_size)
        shapes[f"linear_qkv.features.{name}"] = (rank * width, hidden_size)
    return shapes


def factorized_attention(
    hidden_SBH: torch.Tensor, weights: Weights, config: FactorizedAttentionConfig
) -> torch.Tensor:
    """MFA: q_h = norm(x·S)·U_h for every head h, one k = x·W_k and one v = x·W_v."""
    length, batch, _ = hidden_SBH.shape
    rank, width = config.query_rank, config.head_dim
    shared = weights["linear_qkv.weight"]
    low_SBR = hidden_SBH @ shared[:rank].T
    # Megatron-core's default ε.
    scale = torch.rsqrt(low_SBR.pow(2).mean(dim=-1, keepdim=True) + 1e-5)
    low_SBR = low_SBR * scale * weights["linear_qkv.query_norm"]
    query = (low_SBR @ weights["linear_query_up.weight"].T).view(length, batch, config.num_heads, width)
    key = (hidden_SBH @ shared[rank : rank + width].T).unsqueeze(2)
    value = (hidden_SBH @ shared[rank + width :].T).unsqueeze(2)
    context = attend(rotate(query, config.rotary_width), rotate(key, config.rotary_width), value)
    return context.flatten(2) @ weights["linear_proj.weight"].T


def factorized_weight_shapes(
    config: FactorizedAttentionConfig, hidden_size: int
) -> dict[str, tuple[int, ...]]:
    """Return the full shapes of the layer's weights, by name."""
    features = config.num_heads * config.head_dim
    return {
        "linear_qkv.weight": (config.query_rank + 2 * config.head_dim, hidden_size),
        "linear_qkv.query_norm": (config.query_rank,),
        "linear_query_up.weight": (features, config.query_rank),
        "linear_proj.weight": (hidden_size, features),
    }


@dataclass(frozen=True)
class Definition:
    """A variant's layer, a function of hidden states [S, B, H] and full weights, and its weights' shapes."""

    self_attention: Callable[..., torch.Tensor]
    weight_shapes: Callable[[Any, int], dict[str, tuple[int, ...]]]


_GROUPED = Definition(grouped_attention, grouped_weight_shapes)
DEFINITIONS: dict[str, Definition] = {
    "mha": _GROUPED,
    "gqa": _GROUPED,
    "mqa": _GROUPED,
    "sas": _GROUPED,
    "mfa": Definition(factorized_attention, factorized_weight_shapes),
    "tpa": Definition(tensor_product_attention, tensor_product_weight_shapes),
    "mla": Definition(latent_attention, latent_weight_shapes),
}
