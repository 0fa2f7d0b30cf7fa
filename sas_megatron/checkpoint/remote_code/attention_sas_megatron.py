"""SAS and the attentions that it is compared with, each as the part of a layer that makes and reads heads.

    hidden [B, S, H] -> project: the query, and what decoding keeps of each token
        -> the cache: what is kept of all T tokens, those before included
        -> expand: key and value of all T tokens
        -> softmax attention over M heads -> the mean of SAS's r blocks -> output projection

Letters: B sequences, S new tokens, T all tokens, H hidden size, N and G query and key/value heads, D
features of a head; of SAS (arXiv 2507.07694) r, M = r·N simulated heads and E simulated features; R
features that carry positions, but of tensor products R factors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .configuration_sas_megatron import SASMegatronConfig


class Angles(NamedTuple):
    """Cosine and sine of each token's rotary angles, [B or 1, 1, tokens, R/2]."""

    cosine: torch.Tensor
    sine: torch.Tensor


class Places(NamedTuple):
    """Where tokens stand: angles of the new ones and of all, and which of all each new one may read."""

    of_new: Angles
    of_all: Angles
    # [B or 1, 1, S, T]; None: all up to its own.
    allowed: torch.Tensor | None


def rotate(heads: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Turns the pairs (i, i + R/2) of the first R features of heads [B, heads, tokens, D]."""
    half = angles.cosine.shape[-1]
    first, second, rest = heads.split([half, half, heads.shape[-1] - 2 * half], dim=-1)
    cosine, sine = angles.cosine.to(heads.dtype), angles.sine.to(heads.dtype)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None
) -> torch.Tensor:
    """[B, M, S, E], [B, G, T, E], [B, G, T, D] -> [B, M, S, D]; each key head is read by M/G in a row."""
    width, value_width = query.shape[-1], value.shape[-1]
    context = F.scaled_dot_product_attention(
        query,
        key,
        # The fused paths want equal widths.
        F.pad(value, (0, width - value_width)),
        attn_mask=allowed,
        is_causal=allowed is None and query.shape[2] > 1,
        scale=1 / math.sqrt(width),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    narrowed: torch.Tensor = context[..., :value_width]
    return narrowed


def split_heads(columns: torch.Tensor, width: int) -> torch.Tensor:
    """[B, S, heads·width] -> [B, heads, S, width]."""
    heads: torch.Tensor = columns.unflatten(-1, (-1, width))
    return heads.transpose(1, 2)


class GroupedAttention(nn.Module):
    """Multi-head, grouped-query and multi-query attention; the other kinds are derived from it.

    A kind makes heads of hidden states in `project` and `expand`.
    """

    num_blocks = 1
    linear_qkv: Any

    def __init__(self, config: SASMegatronConfig, layer_index: int) -> None:
        super().__init__()
        fields = config.attention
        self.layer_index = layer_index
        self.num_heads, self.num_groups = fields["num_heads"], fields["num_kv_heads"]
        self.head_dim = fields["head_dim"]
        self.build_projections(config, fields)
        self.linear_proj = nn.Linear(
            self.num_heads * (fields.get("value_head_dim") or self.head_dim),
            config.hidden_size,
            bias=config.linear_bias,
        )

    def build_projections(self, config: SASMegatronConfig, _fields: dict[str, Any]) -> None:
        """Makes the modules that `project` and `expand` use."""
        columns = (self.num_heads + 2 * self.num_groups) * self.head_dim
        self.linear_qkv = nn.Linear(config.hidden_size, columns, bias=config.linear_bias)

    def forward(self, hidden: torch.Tensor, places: Places, cache: Cache | None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]."""
        query, *kept = self.project(hidden, places.of_new)
        if cache is not None:
            kept = cache.update(*kept, self.layer_index)
        kept_key, kept_value = kept
        key, value = self.expand(kept_key, kept_value, places.of_all)
        context = attend(query, key, value, places.allowed)
        averaged = context.unflatten(1, (self.num_blocks, -1)).mean(dim=1)
        projected: torch.Tensor = self.linear_proj(averaged.transpose(1, 2).flatten(2))
        return projected

    def base_heads(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """[B, S, H] -> query [B, N, S, D], key and value [B, G, S, D]."""
        readers = self.num_heads // self.num_groups
        # Each group's queries, key and value are side by side.
        groups = self.linear_qkv(hidden).unflatten(-1, (self.num_groups, readers + 2, self.head_dim))
        parts = groups.split([readers, 1, 1], dim=3)
        return [part.flatten(2, 3).transpose(1, 2) for part in parts]

    def project(self, hidden: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, ...]:
        """[B, S, H] -> queries, and two tensors [B, .., S, ..] of which `expand` makes keys and values."""
        query, key, value = self.base_heads(hidden)
        return rotate(query, angles), rotate(key, angles), value

    def expand(
        self, key: torch.Tensor, value: torch.Tensor, _angles: Angles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept of all tokens -> key [B, G, T, E] and value [B, G, T, D]."""
        return key, value


class ResidualMap(nn.Module):
    """y = expand(x), z = y + refine(ReLU(y)): weights [E, D] of features, or [m, C, k] of heads."""

    def __init__(self, expand_shape: list[int], *, bias: bool) -> None:
        super().__init__()
        wide = expand_shape[0]
        self.expand = nn.Parameter(torch.empty(expand_shape))
        self.refine = nn.Parameter(torch.empty(wide, wide, *expand_shape[2:]))
        self.expand_bias = nn.Parameter(torch.empty(wide)) if bias else None
        self.refine_bias = nn.Parameter(torch.empty(wide)) if bias else None

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[B, heads, S, D] -> as many heads of E features, or r times as many of D."""
        if self.expand.dim() == 2:
            expanded = F.linear(heads, self.expand, self.expand_bias)
            return F.linear(F.relu(expanded), self.refine, self.refine_bias).add(expanded)
        # A token's heads are the channels, and their features the axis that the kernel moves along.
        padding = self.expand.shape[-1] // 2
        channels = heads.transpose(1, 2).flatten(0, 1)
        expanded = F.conv1d(channels, self.expand, self.expand_bias, padding=padding)
        refined = F.conv1d(F.relu(expanded), self.refine, self.refine_bias, padding=padding)
        simulated: torch.Tensor = (expanded + refined).unflatten(0, (heads.shape[0], -1))
        return simulated.transpose(1, 2)


class SimulatedAttention(GroupedAttention):
    """SAS: r·N heads are simulated from N, E query/key features from D; head g·N + n is of block g."""

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """The maps by `heads.query`, `features.key` and so on; those that are switched off are absent."""
        super().build_projections(config, fields)
        self.num_blocks = fields["head_expansion"]
        self.keeps_simulated = config.cache_simulated_heads
        base = {"query": self.num_heads, "key": self.num_groups, "value": self.num_groups}
        heads = {
            name: ResidualMap(
                [self.num_blocks * count, count, fields["kernel_size"]], bias=fields["simulation_bias"]
            )
            for name, count in base.items()
            if fields[f"simulate_{name}_heads"]
        }
        features = {
            name: ResidualMap([fields["simulated_head_dim"], self.head_dim], bias=fields["simulation_bias"])
            for name in ("query", "key")
            if fields["simulate_features"]
        }
        self.simulation = nn.ModuleDict({"heads": nn.ModuleDict(heads), "features": nn.ModuleDict(features)})

    def simulate(self, name: str, heads: torch.Tensor) -> torch.Tensor:
        """Base heads of the query, key or value -> its simulated heads and features."""
        maps: Any = self.simulation["heads"]
        features: Any = self.simulation["features"]
        heads = maps[name](heads) if name in maps else heads.repeat(1, self.num_blocks, 1, 1)
        return features[name](heads) if name in features else heads

    def project(self, hidden: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, ...]:
        """Positions go on after the simulation, so that base keys are kept without."""
        query, key, value = self.base_heads(hidden)
        if self.keeps_simulated:
            key, value = rotate(self.simulate("key", key), angles), self.simulate("value", value)
        return rotate(self.simulate("query", query), angles), key, value

    def expand(
        self, key: torch.Tensor, value: torch.Tensor, angles: Angles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Simulates what is kept, unless that is simulated already."""
        if self.keeps_simulated:
            return key, value
        return rotate(self.simulate("key", key), angles), self.simulate("value", value)


class LatentAttention(GroupedAttention):
    """MLA (arXiv 2405.04434): keys and values of all heads from one kept latent, and one rotary key."""

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """Down and up projections, with a norm between."""
        hidden, heads = config.hidden_size, self.num_heads
        latent, rank = fields["kv_lora_rank"], fields["query_lora_rank"]
        self.rotary_dim, self.value_dim = fields["rotary_head_dim"], fields["value_head_dim"]
        query_width = heads * (self.head_dim + self.rotary_dim)
        if rank is None:
            self.linear_q_proj = nn.Linear(hidden, query_width, bias=False)
        else:
            self.linear_q_down_proj = nn.Linear(hidden, rank, bias=False)
            self.q_layernorm = nn.RMSNorm(rank, eps=config.norm_epsilon)
            self.linear_q_up_proj = nn.Linear(rank, query_width, bias=False)
        self.linear_kv_down_proj = nn.Linear(hidden, latent + self.rotary_dim, bias=False)
        self.kv_layernorm = nn.RMSNorm(latent, eps=config.norm_epsilon)
        self.linear_kv_up_proj = nn.Linear(latent, heads * (self.head_dim + self.value_dim), bias=False)

    def project(self, hidden: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, ...]:
        """Queries [B, N, S, D + R]; the latent [B, 1, S, L] and the turned rotary key [B, 1, S, R]."""
        if hasattr(self, "linear_q_proj"):
            columns = self.linear_q_proj(hidden)
        else:
            columns = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        query, rotary_query = split_heads(columns, self.head_dim + self.rotary_dim).split(
            [self.head_dim, self.rotary_dim], dim=-1
        )
        latent, rotary_key = self.linear_kv_down_proj(hidden)[:, None].split(
            [self.kv_layernorm.weight.shape[0], self.rotary_dim], dim=-1
        )
        query = torch.cat([query, self.rotate_neighbours(rotary_query, angles)], dim=-1)
        return query, self.kv_layernorm(latent), self.rotate_neighbours(rotary_key, angles)

    def rotate_neighbours(self, heads: torch.Tensor, angles: Angles) -> torch.Tensor:
        """Turns the pairs (2i, 2i + 1), and lays them out as two halves: in queries and keys alike."""
        return rotate(torch.cat([heads[..., 0::2], heads[..., 1::2]], dim=-1), angles)

    def expand(
        self, latent: torch.Tensor, rotary_key: torch.Tensor, _angles: Angles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each head's key and value are read out of the latent; the rotary key is the same for all."""
        heads = split_heads(self.linear_kv_up_proj(latent[:, 0]), self.head_dim + self.value_dim)
        key, value = heads.split([self.head_dim, self.value_dim], dim=-1)
        return torch.cat([key, rotary_key.expand(-1, self.num_heads, -1, -1)], dim=-1), value


class SharedProjection(nn.Module):
    """The rows of the query's C shared columns, of the one key and of the one value, in this order."""

    def __init__(self, hidden_size: int, query_rank: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(query_rank + 2 * head_dim, hidden_size))
        self.query_norm = nn.Parameter(torch.empty(query_rank))


class FactorizedAttention(GroupedAttention):
    """MFA (arXiv 2412.19255): queries of all heads from C normalized columns; one key and one value head."""

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """The shared columns, and the queries' up projection."""
        rank, self.epsilon = fields["query_rank"], config.norm_epsilon
        self.linear_qkv = SharedProjection(config.hidden_size, rank, self.head_dim)
        self.linear_query_up = nn.Linear(rank, self.num_heads * self.head_dim, bias=False)

    def base_heads(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """[B, S, H] -> query [B, N, S, D], key and value [B, 1, S, D]."""
        norm = self.linear_qkv.query_norm
        columns = F.linear(hidden, self.linear_qkv.weight)
        query, key, value = columns.split([len(norm), self.head_dim, self.head_dim], dim=-1)
        normalized = F.rms_norm(query, norm.shape, norm, self.epsilon)
        return [split_heads(self.linear_query_up(normalized), self.head_dim), key[:, None], value[:, None]]


class TensorProductAttention(GroupedAttention):
    """TPA (arXiv 2501.06425): heads (1/R)·Σ_r A_r ⊗ B_r, of a vector over heads and one over features."""

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """Rows of A by head, then factor; of B by factor, then feature; whole queries have no B."""
        self.ranks = {"key": fields["key_rank"], "value": fields["value_rank"]}
        if fields["factorize_query"]:
            self.ranks["query"] = fields["query_rank"]
        widths = {"query": self.head_dim, **self.ranks}

        def rows(count: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(count, config.hidden_size))

        self.linear_qkv = nn.ModuleDict(
            {
                "heads": nn.ParameterDict(
                    {name: rows(self.num_heads * width) for name, width in widths.items()}
                ),
                "features": nn.ParameterDict(
                    {name: rows(rank * self.head_dim) for name, rank in self.ranks.items()}
                ),
            }
        )

    def factors(self, name: str, hidden: torch.Tensor, angles: Angles | None) -> torch.Tensor:
        """[B, S, H] -> A and B side by side, [B, R, S, N + D]; turning B turns every head alike."""
        heads, features = self.linear_qkv["heads"], self.linear_qkv["features"]
        of_heads = F.linear(hidden, heads[name]).unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2)
        of_features = split_heads(F.linear(hidden, features[name]), self.head_dim)
        turned = of_features if angles is None else rotate(of_features, angles)
        return torch.cat([of_heads, turned], dim=-1)

    def combine(self, factors: torch.Tensor) -> torch.Tensor:
        """[B, R, S, N + D] -> heads [B, N, S, D]."""
        of_heads, of_features = factors.split([self.num_heads, self.head_dim], dim=-1)
        return torch.einsum("brsn,brsd->bnsd", of_heads / factors.shape[1], of_features)

    def project(self, hidden: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, ...]:
        """Queries [B, N, S, D]; the factors of keys and of values are what is kept."""
        if "query" in self.ranks:
            query = self.combine(self.factors("query", hidden, angles))
        else:
            columns = F.linear(hidden, self.linear_qkv["heads"]["query"])
            query = rotate(split_heads(columns, self.head_dim), angles)
        return query, self.factors("key", hidden, angles), self.factors("value", hidden, None)

    def expand(
        self, key: torch.Tensor, value: torch.Tensor, _angles: Angles
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Heads of the kept factors."""
        return self.combine(key), self.combine(value)


ATTENTIONS: dict[str, type[GroupedAttention]] = {
    "mha": GroupedAttention,
    "gqa": GroupedAttention,
    "mqa": GroupedAttention,
    "mla": LatentAttention,
    "mfa": FactorizedAttention,
    "sas": SimulatedAttention,
    "tpa": TensorProductAttention,
}
