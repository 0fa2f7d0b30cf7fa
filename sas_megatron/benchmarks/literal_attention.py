"""SAS as its definition reads, in plain PyTorch modules: the yardstick of `bench attention`.

No Megatron-core, no parallelism: Conv1d and Linear modules, torch's scaled-dot-product attention on
the widths as they are, and every block of heads through the output projection before the mean.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from sas_megatron.attention.sas.config import SimulatedAttentionConfig


class LiteralHeadSimulation(nn.Module):
    """u = conv1(x), w = u + conv2(ReLU(u)), heads as channels."""

    def __init__(self, heads: int, config: SimulatedAttentionConfig) -> None:
        super().__init__()
        many, padding = heads * config.head_expansion, config.kernel_size // 2
        self.expand = nn.Conv1d(heads, many, config.kernel_size, padding=padding, bias=config.simulation_bias)
        self.refine = nn.Conv1d(many, many, config.kernel_size, padding=padding, bias=config.simulation_bias)

    def forward(self, heads_SBND: torch.Tensor) -> torch.Tensor:
        """[S, B, N, D] -> [S, B, rN, D]."""
        u = self.expand(heads_SBND.flatten(0, 1))
        w: torch.Tensor = (u + self.refine(torch.relu(u))).unflatten(0, heads_SBND.shape[:2])
        return w


class LiteralFeatureSimulation(nn.Module):
    """y = x·A1ᵀ + a1, z = y + ReLU(y)·A2ᵀ + a2."""

    def __init__(self, config: SimulatedAttentionConfig) -> None:
        super().__init__()
        wide = config.query_key_dim
        self.expand = nn.Linear(config.head_dim, wide, bias=config.simulation_bias)
        self.refine = nn.Linear(wide, wide, bias=config.simulation_bias)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., E]."""
        y: torch.Tensor = self.expand(heads)
        z: torch.Tensor = y + self.refine(torch.relu(y))
        return z


class LiteralSimulatedAttention(nn.Module):
    """The five steps of SAS for a whole self-attention block, multi-head or grouped."""

    def __init__(self, hidden_size: int, config: SimulatedAttentionConfig) -> None:
        super().__init__()
        self.config = config
        heads, groups, width = config.num_heads, config.num_key_value_heads, config.head_dim
        self.linear_qkv = nn.Linear(hidden_size, (heads + 2 * groups) * width, bias=False)
        self.linear_proj = nn.Linear(heads * width, hidden_size, bias=False)
        self.heads = nn.ModuleDict(
            {name: LiteralHeadSimulation(base, config) for name, base in config.head_simulations().items()}
        )
        self.features = nn.ModuleDict({name: LiteralFeatureSimulation(config) for name in ("query", "key")})

    def forward(self, hidden_SBH: torch.Tensor, angles_SR: torch.Tensor) -> torch.Tensor:
        """[S, B, H] -> [S, B, H]; angles [S, rotary_dim]."""
        heads, groups = self.config.num_heads, self.config.num_key_value_heads
        grouped = self.linear_qkv(hidden_SBH).unflatten(-1, (groups, heads // groups + 2, -1))
        query, key, value = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        query, key, value = self.heads["query"](query), self.heads["key"](key), self.heads["value"](value)
        query, key = self.features["query"](query), self.features["key"](key)
        query, key = rotate(query, angles_SR), rotate(key, angles_SR)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        scale = 1 / math.sqrt(query.shape[-1])
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=heads != groups
        )
        blocks = context.permute(2, 0, 1, 3).chunk(self.config.head_expansion, dim=2)
        return torch.stack([self.linear_proj(block.flatten(2)) for block in blocks]).mean(dim=0)


def rotate(heads_SBME: torch.Tensor, angles_SR: torch.Tensor) -> torch.Tensor:
    """Rotary positions on the first R features; pairs are R/2 apart, and angles in float32."""
    width = angles_SR.shape[-1]
    turned, rest = heads_SBME[..., :width], heads_SBME[..., width:]
    first, second = turned.chunk(2, dim=-1)
    cosine, sine = (x[:, None, None].to(heads_SBME.dtype) for x in (angles_SR.cos(), angles_SR.sin()))
    return torch.cat([turned * cosine + torch.cat([-second, first], dim=-1) * sine, rest], dim=-1)
