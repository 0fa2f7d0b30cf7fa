"""Sizes of the attention blocks that the benchmarks measure, and a literal form of SAS for comparison.

The literal form follows the definition in plain PyTorch modules, without Megatron-core and without
parallelism: Conv1d and Linear modules, torch's scaled-dot-product attention without padding of the head
widths, and the output projection of every block of heads before the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from sas_megatron.attention.gqa.config import MultiHeadAttentionConfig
from sas_megatron.attention.sas.config import SimulatedAttentionConfig


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a self-attention block on full sequences, for multi-head attention and for SAS."""

    num_heads: int = 12
    head_expansion: int = 3
    head_dim: int = 64
    simulated_head_dim: int = 96
    kernel_size: int = 3
    sequence_length: int = 512
    batch_size: int = 2

    @property
    def hidden_size(self) -> int:
        """Hidden size of the model, H = N·D."""
        return self.num_heads * self.head_dim

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T = S·B."""
        return self.sequence_length * self.batch_size

    def simulated(self, **fields: Any) -> SimulatedAttentionConfig:
        """Return the config of the SAS block."""
        return SimulatedAttentionConfig(
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            head_expansion=self.head_expansion,
            simulated_head_dim=self.simulated_head_dim,
            kernel_size=self.kernel_size,
            **fields,
        )

    def multi_head(self, **fields: Any) -> MultiHeadAttentionConfig:
        """Return the config of the multi-head block with the same base heads."""
        return MultiHeadAttentionConfig(num_heads=self.num_heads, head_dim=self.head_dim, **fields)


class LiteralHeadSimulation(nn.Module):
    """Head simulation, u = conv1(x), w = u + conv2(ReLU(u)), with the heads as channels."""

    def __init__(self, heads: int, config: SimulatedAttentionConfig) -> None:
        super().__init__()
        simulated_heads, padding = heads * config.head_expansion, config.kernel_size // 2
        options: dict[str, Any] = {"padding": padding, "bias": config.simulation_bias}
        self.expand = nn.Conv1d(heads, simulated_heads, config.kernel_size, **options)
        self.refine = nn.Conv1d(simulated_heads, simulated_heads, config.kernel_size, **options)

    def forward(self, heads_SBND: torch.Tensor) -> torch.Tensor:
        """Simulate heads: [S, B, N, D] -> [S, B, rN, D]."""
        u = self.expand(heads_SBND.flatten(0, 1))
        w: torch.Tensor = (u + self.refine(torch.relu(u))).unflatten(0, heads_SBND.shape[:2])
        return w


class LiteralFeatureSimulation(nn.Module):
    """Feature simulation, y = x·A1ᵀ + a1, z = y + ReLU(y)·A2ᵀ + a2."""

    def __init__(self, config: SimulatedAttentionConfig) -> None:
        super().__init__()
        features = config.query_key_dim
        self.expand = nn.Linear(config.head_dim, features, bias=config.simulation_bias)
        self.refine = nn.Linear(features, features, bias=config.simulation_bias)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Simulate features: [..., D] -> [..., E]."""
        y: torch.Tensor = self.expand(heads)
        z: torch.Tensor = y + self.refine(torch.relu(y))
        return z


class LiteralSimulatedAttention(nn.Module):
    """The five steps of SAS in a complete self-attention block, with G = N or grouped key/value heads."""

    def __init__(self, hidden_size: int, config: SimulatedAttentionConfig) -> None:
        super().__init__()
        self.config = config
        heads, groups, head_dim = config.num_heads, config.num_key_value_heads, config.head_dim
        self.linear_qkv = nn.Linear(hidden_size, (heads + 2 * groups) * head_dim, bias=False)
        self.linear_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)
        self.heads = nn.ModuleDict(
            {name: LiteralHeadSimulation(base, config) for name, base in config.head_simulations().items()}
        )
        self.features = nn.ModuleDict({name: LiteralFeatureSimulation(config) for name in ("query", "key")})

    def forward(self, hidden_SBH: torch.Tensor, angles_SR: torch.Tensor) -> torch.Tensor:
        """Compute the block's output [S, B, H] from hidden states and rotary angles [S, rotary_dim]."""
        heads, groups = self.config.num_heads, self.config.num_key_value_heads
        grouped = self.linear_qkv(hidden_SBH).unflatten(-1, (groups, heads // groups + 2, -1))
        query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        query, key, value = self.heads["query"](query), self.heads["key"](key), self.heads["value"](value)
        query, key = self.features["query"](query), self.features["key"](key)
        query, key = apply_rope(query, angles_SR), apply_rope(key, angles_SR)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        scale = 1 / math.sqrt(query.shape[-1])
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=heads != groups
        )
        blocks = context.permute(2, 0, 1, 3).chunk(self.config.head_expansion, dim=2)
        return torch.stack([self.linear_proj(block.flatten(2)) for block in blocks]).mean(dim=0)


def apply_rope(heads_SBME: torch.Tensor, angles_SR: torch.Tensor) -> torch.Tensor:
    """Apply rotary embeddings to the first R features, in pairs R/2 apart. The angles are in float32."""
    rotary_dim = angles_SR.shape[-1]
    rotary, rest = heads_SBME[..., :rotary_dim], heads_SBME[..., rotary_dim:]
    first, second = rotary.chunk(2, dim=-1)
    cosine, sine = (x[:, None, None].to(heads_SBME.dtype) for x in (angles_SR.cos(), angles_SR.sin()))
    return torch.cat([rotary * cosine + torch.cat([-second, first], dim=-1) * sine, rest], dim=-1)
