"""Slow, obvious reference implementations of the attention variants, for tests.

Every step follows the paper's equations. For SAS, the taps of the convolution are computed one by one, and
every block of heads passes through the projection before the average. Softmax is over a masked score matrix.
Weights are full tensors, named as in the layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sas_megatron.attention.mfa.config import FactorizedAttentionConfig
from sas_megatron.attention.mla.config import LatentAttentionConfig
from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.tpa.config import TensorProductAttentionConfig
from sas_megatron.config.attention import AttentionConfig
from tests.attention.modifier_definitions import (
    Weights,
    knock_values,
    modifier_weight_shapes,
    modify_output,
    normalize_query_key,
    root_mean_square_norm,
)
from tests.attention.step_definitions import (
    attend,
    attend_blocks,
    rotate,
    rotate_neighbours,
    simulate_features,
    simulate_heads,
)


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
    query, key = normalize_query_key(query, key, weights, config)
    if rotary:
        query, key = rotate(query, config.rotary_width), rotate(key, config.rotary_width)
    context = attend_blocks(
        query, key, knock_values(value, weights, config), blocks, window=config.window_size
    )
    if config.output_norm or config.output_gate != "none":
        # They follow the aggregation of blocks.
        return project(torch.stack(context).sum(dim=0) / divisor, hidden_SBH, weights, config)
    projected = [block.flatten(2) @ weights["linear_proj.weight"].T for block in context]
    return torch.stack(projected).sum(dim=0) / divisor


def project(
    context_SBND: torch.Tensor, hidden_SBH: torch.Tensor, weights: Weights, config: AttentionConfig
) -> torch.Tensor:
    """Modify the result of attention, and apply the output projection."""
    context = modify_output(context_SBND, hidden_SBH, weights, config)
    return context.flatten(2) @ weights["linear_proj.weight"].T


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
    rotary_key = hidden_SBH @ down[config.kv_lora_rank :].T
    queries, keys, values = [], [], []
    for of_query, of_key_value in zip(
        query_up.chunk(config.num_heads),
        weights["linear_kv_up_proj.weight"].chunk(config.num_heads),
        strict=True,
    ):
        queries.append(query_latent @ of_query.T)
        key, value = of_key_value[: config.head_dim], of_key_value[config.head_dim :]
        keys.append(torch.cat([latent @ key.T, rotary_key], dim=-1))
        values.append(latent @ value.T)
    query, key, value = (torch.stack(heads, dim=2) for heads in (queries, keys, values))
    query, key = normalize_query_key(query, key, weights, config)
    if config.rotary != "none":
        query, key = (
            torch.cat([x[..., : config.head_dim], rotate_neighbours(x[..., config.head_dim :])], dim=-1)
            for x in (query, key)
        )
    context = attend(query, key, knock_values(value, weights, config), window=config.window_size)
    return project(context, hidden_SBH, weights, config)


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


def differential_attention(
    hidden_SBH: torch.Tensor, weights: Weights, config: AttentionConfig
) -> torch.Tensor:
    """out_i = a_2i - σ(x·W_λ)_i·a_(2i+1), with 2N query heads on G keys and values (Diff-Transformer-V2)."""
    length, batch, _ = hidden_SBH.shape
    groups, width = config.num_key_value_heads, config.head_dim
    # Megatron-core keeps each group's queries, key and value together.
    grouped = (hidden_SBH @ weights["linear_qkv.weight"].T).view(length, batch, groups, -1, width)
    query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
    query, key = normalize_query_key(query, key, weights, config)
    query, key = rotate(query, config.rotary_width), rotate(key, config.rotary_width)
    a = attend(query, key, knock_values(value, weights, config), window=config.window_size)
    factors = torch.sigmoid(hidden_SBH @ weights["linear_lambda.weight"].T)
    heads = [a[:, :, 2 * i] - factors[..., i, None] * a[:, :, 2 * i + 1] for i in range(config.num_heads)]
    return project(torch.stack(heads, dim=2), hidden_SBH, weights, config)


def differential_weight_shapes(config: AttentionConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the full shapes of the layer's weights, by name."""
    heads, groups, width = config.num_heads, config.num_key_value_heads, config.head_dim
    return {
        "linear_qkv.weight": ((2 * heads + 2 * groups) * width, hidden_size),
        "linear_proj.weight": (hidden_size, heads * width),
        "linear_lambda.weight": (heads, hidden_size),
    }


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
            query = of_heads.view(length, batch, heads, width)
            heads_by_name[name] = query if config.qk_norm else rotate(query, config.rotary_width)
            continue
        rank = {"query": config.query_rank or 6, "key": config.key_rank, "value": config.value_rank}[name]
        a_SBNR = of_heads.view(length, batch, heads, rank)
        b_SBRD = (hidden_SBH @ weights[f"linear_qkv.features.{name}"].T).view(length, batch, rank, width)
        if name != "value" and not config.qk_norm:
            b_SBRD = rotate(b_SBRD, config.rotary_width)
        total = hidden_SBH.new_zeros(length, batch, heads, width)
        for r in range(rank):
            total = total + torch.einsum("sbn,sbd->sbnd", a_SBNR[..., r], b_SBRD[:, :, r])
        heads_by_name[name] = total / rank
    query, key = heads_by_name["query"], heads_by_name["key"]
    if config.qk_norm:
        query, key = normalize_query_key(query, key, weights, config)
        query, key = rotate(query, config.rotary_width), rotate(key, config.rotary_width)
    context = attend(
        query, key, knock_values(heads_by_name["value"], weights, config), window=config.window_size
    )
    return project(context, hidden_SBH, weights, config)


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
    query, key = normalize_query_key(query, key, weights, config)
    value = knock_values(value, weights, config)
    query, key = rotate(query, config.rotary_width), rotate(key, config.rotary_width)
    context = attend(query, key, value, window=config.window_size)
    return project(context, hidden_SBH, weights, config)


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
    own_weight_shapes: Callable[[Any, int], dict[str, tuple[int, ...]]]

    def weight_shapes(self, config: AttentionConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Return the full shapes of the layer's weights by name, those of modifiers included."""
        return {**self.own_weight_shapes(config, hidden_size), **modifier_weight_shapes(config, hidden_size)}


_GROUPED = Definition(grouped_attention, grouped_weight_shapes)
DEFINITIONS: dict[str, Definition] = {
    "mha": _GROUPED,
    "gqa": _GROUPED,
    "mqa": _GROUPED,
    "sas": _GROUPED,
    "mfa": Definition(factorized_attention, factorized_weight_shapes),
    "tpa": Definition(tensor_product_attention, tensor_product_weight_shapes),
    "diff": Definition(differential_attention, differential_weight_shapes),
    "mla": Definition(latent_attention, latent_weight_shapes),
}
