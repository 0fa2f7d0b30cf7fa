"""Slow, obvious reference implementations of the modifiers of attention, head by head, for tests.

Sources: gates, Qiu et al. 2025 (arXiv 2505.06708; `modeling_qwen3.py` in qiuzh20/gated_attention); knocking
heads, equation 9 of Zhou et al. 2025 (arXiv 2510.23052); RMSNorm of queries and keys before rotary
embeddings, Qwen3 (same file as the gates); RMSNorm of each head's result with a shared scale, `subln` in
Diff-Transformer of microsoft/unilm. Weights are full tensors, named as in the layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sas_megatron.config.attention import AttentionConfig

PREFIX = "core_attention.modifiers."

Weights = Mapping[str, torch.Tensor]


def root_mean_square_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float = 1e-5) -> torch.Tensor:
    """x / √(mean x² + ε) · weight."""
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


def normalize_query_key(
    query_SBME: torch.Tensor, key_SBGE: torch.Tensor, weights: Weights, config: AttentionConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return norm(q_h)·γ_q and norm(k_h)·γ_k for each head h if `qk_norm` is on."""
    if not config.qk_norm:
        return query_SBME, key_SBGE
    normalized = []
    for name, heads in (("query_norm", query_SBME), ("key_norm", key_SBGE)):
        scale = weights[PREFIX + name]
        normalized.append(torch.stack([root_mean_square_norm(x, scale) for x in heads.unbind(2)], dim=2))
    return normalized[0], normalized[1]


def knock_values(value_SBGD: torch.Tensor, weights: Weights, config: AttentionConfig) -> torch.Tensor:
    """Ṽ_h = 2·(V_h·W_up ⊙ σ(V_h·W_gate))·W_down for each value head h if `knocking_heads` is on."""
    if not config.knocking_heads:
        return value_SBGD
    up, gate, down = (weights[f"{PREFIX}knocking.{name}"] for name in ("up", "gate", "down"))
    knocked = [2 * ((v @ up) * torch.sigmoid(v @ gate)) @ down for v in value_SBGD.unbind(2)]
    return torch.stack(knocked, dim=2)


def modify_output(
    context_SBND: torch.Tensor, hidden_SBH: torch.Tensor, weights: Weights, config: AttentionConfig
) -> torch.Tensor:
    """Y_h = norm(Y_h)·γ, then Y_h ⊙ σ(X·W_h), with one gate for the head or one for each feature."""
    outputs = []
    for head, y in enumerate(context_SBND.unbind(2)):
        if config.output_norm:
            y = root_mean_square_norm(y, weights[PREFIX + "output_norm"])
        if config.output_gate != "none":
            rows = weights[PREFIX + "output_gate.weight"].chunk(config.num_heads)[head]
            y = y * torch.sigmoid(hidden_SBH @ rows.T)
        outputs.append(y)
    return torch.stack(outputs, dim=2)


def modifier_weight_shapes(config: AttentionConfig, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return the full shapes of the modifiers' weights, by name."""
    width = config.value_width
    shapes: dict[str, tuple[int, ...]] = {}
    if config.qk_norm:
        shapes |= dict.fromkeys(("query_norm", "key_norm"), (config.query_key_dim,))
    if config.knocking_heads:
        shapes |= dict.fromkeys(("knocking.up", "knocking.gate", "knocking.down"), (width, width))
    if config.output_norm:
        shapes["output_norm"] = (width,)
    gates = {"none": 0, "headwise": config.num_heads, "elementwise": config.num_heads * width}
    if gates[config.output_gate]:
        shapes["output_gate.weight"] = (gates[config.output_gate], hidden_size)
    return {PREFIX + name: shape for name, shape in shapes.items()}
