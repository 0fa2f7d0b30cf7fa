"""SAS and the attention variants that it is compared with, as transformers modules.

    hidden [B, S, H] -> project: queries, and the tensors that the KV cache stores of each token
        -> the KV cache: these tensors of all T tokens, previous ones included
        -> expand: keys and values of all T tokens -> modifiers
        -> softmax attention over M heads -> aggregation of the r blocks of SAS -> modifiers
        -> output projection

Letters: B sequences, S new tokens, T all tokens, H hidden size, N and G query and key/value heads, D features
of a head; for SAS (arXiv 2507.07694) r blocks, M = r·N simulated heads and E simulated features; R features
with rotary embeddings, except for tensor product attention, where R is the number of factors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .attention_steps_sas_megatron import (
    Modifiers,
    Positions,
    RopeCosSin,
    apply_rope,
    attend,
    split_heads,
)
from .configuration_sas_megatron import SASMegatronConfig
from .simulated_attention import Simulation, SimulationShape, aggregate_blocks


class GroupedAttention(nn.Module):
    """Multi-head, grouped-query and multi-query attention. The other variants derive from it.

    A variant computes heads from hidden states in `project` and `expand`.
    """

    num_blocks = 1
    aggregation = "mean"
    # Whether `expand` computes keys and values from the cached tensors.
    expands_cache = False
    linear_qkv: Any

    def __init__(self, config: SASMegatronConfig, layer_index: int) -> None:
        super().__init__()
        fields = config.attention
        self.layer_index = layer_index
        self.num_heads, self.num_groups = fields["num_heads"], fields["num_kv_heads"]
        self.num_query_heads, self.head_dim = self.num_heads, fields["head_dim"]
        # As in the native model, core attention holds the weights of the modifiers.
        self.core_attention = nn.ModuleDict({"modifiers": Modifiers(config)})
        self.build_projections(config, fields)
        self.linear_proj = nn.Linear(
            self.num_heads * (fields.get("value_head_dim") or self.head_dim),
            config.hidden_size,
            bias=config.linear_bias,
        )

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """Build the modules that `project` and `expand` use."""
        columns = (self.num_query_heads + 2 * self.num_groups) * self.head_dim
        has_bias = config.linear_bias or fields.get("qkv_bias", False)
        self.linear_qkv = nn.Linear(config.hidden_size, columns, bias=has_bias)

    def forward(self, hidden: torch.Tensor, positions: Positions, cache: Cache | None) -> torch.Tensor:
        """Return the layer's output for hidden states, both [B, S, H]."""
        # QK-norm precedes the rotary embeddings, which are then applied here.
        (rope_of_new, later_of_new), (rope_of_all, later_of_all) = (
            self.modifiers.split_rope(rope) for rope in (positions.rope_of_new, positions.rope_of_all)
        )
        query, kept_key, kept_value = self.project(hidden, rope_of_new)
        query = self.rotate(self.modifiers.normalize("query_norm", query), later_of_new)
        if not self.expands_cache:
            kept_key, kept_value = self.modify(kept_key, kept_value, later_of_new)
        if cache is not None:
            kept_key, kept_value = cache.update(kept_key, kept_value, self.layer_index)
        key, value = self.expand(kept_key, kept_value, rope_of_all)
        if self.expands_cache:
            key, value = self.modify(key, value, later_of_all)
        context = attend(query, key, value, positions.allowed)
        aggregated = aggregate_blocks(
            context.permute(2, 0, 1, 3), self.num_blocks, aggregation=self.aggregation
        ).transpose(0, 1)
        reduced = self.modifiers.normalize("output_norm", self.reduce_heads(aggregated, hidden))
        projected: torch.Tensor = self.linear_proj(self.modifiers.gate(reduced, hidden))
        return projected

    @property
    def modifiers(self) -> Any:
        """The modifiers of this layer."""
        return self.core_attention["modifiers"]

    def modify(
        self, key: torch.Tensor, value: torch.Tensor, rope: RopeCosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys after QK-norm and the rotary embeddings that follow it, and knocked values."""
        return self.rotate(self.modifiers.normalize("key_norm", key), rope), self.modifiers.knock(value)

    def rotate(self, heads: torch.Tensor, rope: RopeCosSin) -> torch.Tensor:
        """Apply rotary embeddings to normalized heads of queries or keys."""
        return apply_rope(heads, rope)

    def reduce_heads(self, context: torch.Tensor, _hidden: torch.Tensor) -> torch.Tensor:
        """Return N heads [B, S, N, D] from the result of attention."""
        return context

    def base_heads(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Return the projected query [B, N, S, D], and key and value [B, G, S, D]."""
        readers = self.num_query_heads // self.num_groups
        # Queries, key and value of a group are next to each other.
        groups = self.linear_qkv(hidden).unflatten(-1, (self.num_groups, readers + 2, self.head_dim))
        parts = groups.split([readers, 1, 1], dim=3)
        return [part.flatten(2, 3).transpose(1, 2) for part in parts]

    def project(self, hidden: torch.Tensor, rope: RopeCosSin) -> tuple[torch.Tensor, ...]:
        """Return queries, and two tensors [B, .., S, ..] from which `expand` gets keys and values."""
        query, key, value = self.base_heads(hidden)
        return apply_rope(query, rope), apply_rope(key, rope), value

    def expand(
        self, key: torch.Tensor, value: torch.Tensor, _rope: RopeCosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return key [B, G, T, E] and value [B, G, T, D] from the cached tensors of all tokens."""
        return key, value


class DifferentialAttention(GroupedAttention):
    """Differential attention, second version (microsoft/unilm): differences of neighbouring query heads."""

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """Build the fused projection with 2N query heads, and that of λ."""
        self.num_query_heads = 2 * self.num_heads
        super().build_projections(config, fields)
        self.linear_lambda = nn.Linear(config.hidden_size, self.num_heads, bias=False)

    def reduce_heads(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return a_2i - σ(x·W_λ)_i · a_(2i+1), [B, S, N, D]."""
        factors = torch.sigmoid(self.linear_lambda(hidden)).unsqueeze(-1)
        return context[:, :, 0::2] - factors * context[:, :, 1::2]


class SimulatedAttention(GroupedAttention):
    """SAS: attention with r·N heads that are simulated from N, and E query/key features from D."""

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """Build the fused projection and the simulation."""
        super().build_projections(config, fields)
        self.num_blocks, self.aggregation = fields["head_expansion"], fields["aggregation"]
        self.rotates_base_heads = fields["rotary"] == "before"
        self.caches_simulated = config.cache_simulated_heads
        self.expands_cache = not self.caches_simulated
        base = {"query": self.num_heads, "key": self.num_groups, "value": self.num_groups}
        self.simulation = Simulation(
            SimulationShape(
                num_heads={name: base[name] for name in base if fields[f"simulate_{name}_heads"]},
                expansion=self.num_blocks,
                kernel_size=fields["kernel_size"],
                head_dim=self.head_dim,
                simulated_head_dim=fields["simulated_head_dim"] if fields["simulate_features"] else None,
                bias=fields["simulation_bias"],
                head_activation=fields["head_activation"],
                feature_activation=fields["feature_activation"],
            )
        )

    def simulate(self, name: str, heads: torch.Tensor, rope: RopeCosSin | None = None) -> torch.Tensor:
        """Simulate heads and features of the query, key or value from base heads [B, heads, S, D].

        `rope` is for simulated queries and keys; it is not applied if base heads have rotary embeddings.
        """
        # The simulation takes tokens first: [B·S, heads, D].
        simulated = self.simulation(name, heads.transpose(1, 2).flatten(0, 1))
        by_sequence: torch.Tensor = simulated.unflatten(0, (heads.shape[0], -1)).transpose(1, 2)
        return by_sequence if rope is None or self.rotates_base_heads else apply_rope(by_sequence, rope)

    def project(self, hidden: torch.Tensor, rope: RopeCosSin) -> tuple[torch.Tensor, ...]:
        """Return simulated queries, and base keys and values, or simulated ones if these are cached.

        If rotary embeddings are applied after the simulation, base keys are cached without them.
        """
        query, key, value = self.base_heads(hidden)
        if self.rotates_base_heads:
            query, key = apply_rope(query, rope), apply_rope(key, rope)
        if self.caches_simulated:
            key, value = self.simulate("key", key, rope), self.simulate("value", value)
        return self.simulate("query", query, rope), key, value

    def expand(
        self, key: torch.Tensor, value: torch.Tensor, rope: RopeCosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Simulate the cached keys and values, unless they are simulated already."""
        if self.caches_simulated:
            return key, value
        return self.simulate("key", key, rope), self.simulate("value", value)


class LatentAttention(GroupedAttention):
    """MLA (arXiv 2405.04434): keys and values of all heads from one cached latent and one rotary key."""

    expands_cache = True

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """Build down and up projections, and the norms between them."""
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

    def project(self, hidden: torch.Tensor, rope: RopeCosSin) -> tuple[torch.Tensor, ...]:
        """Return queries [B, N, S, D + R], the latent [B, 1, S, L] and the rotary key [B, 1, S, R]."""
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
        query = torch.cat([query, self.rotate_neighbours(rotary_query, rope)], dim=-1)
        return query, self.kv_layernorm(latent), self.rotate_neighbours(rotary_key, rope)

    def rotate_neighbours(self, heads: torch.Tensor, rope: RopeCosSin) -> torch.Tensor:
        """Rotate the pairs (2i, 2i + 1), and store them as two halves, in queries and keys."""
        if rope.cosine.shape[-1] == 0:
            return heads
        return apply_rope(torch.cat([heads[..., 0::2], heads[..., 1::2]], dim=-1), rope)

    def expand(
        self, latent: torch.Tensor, rotary_key: torch.Tensor, _rope: RopeCosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Project each head's key and value from the latent; all keys include the rotary key."""
        heads = split_heads(self.linear_kv_up_proj(latent[:, 0]), self.head_dim + self.value_dim)
        key, value = heads.split([self.head_dim, self.value_dim], dim=-1)
        return torch.cat([key, rotary_key.expand(-1, self.num_heads, -1, -1)], dim=-1), value

    def rotate(self, heads: torch.Tensor, rope: RopeCosSin) -> torch.Tensor:
        """Apply rotary embeddings to the last R features of normalized heads."""
        first, rotary = heads.split([self.head_dim, self.rotary_dim], dim=-1)
        return torch.cat([first, self.rotate_neighbours(rotary, rope)], dim=-1)


class SharedProjection(nn.Module):
    """The weight rows of the query's shared columns, of the key and of the value, in this order."""

    def __init__(self, hidden_size: int, query_rank: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(query_rank + 2 * head_dim, hidden_size))
        self.query_norm = nn.Parameter(torch.empty(query_rank))


class FactorizedAttention(GroupedAttention):
    """MFA (arXiv 2412.19255): low-rank queries of all heads, and one key and one value head."""

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """Build the projection to shared columns, and the up projection of the queries."""
        rank, self.epsilon = fields["query_rank"], config.norm_epsilon
        self.linear_qkv = SharedProjection(config.hidden_size, rank, self.head_dim)
        self.linear_query_up = nn.Linear(rank, self.num_heads * self.head_dim, bias=False)

    def base_heads(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Return the projected query [B, N, S, D], and key and value [B, 1, S, D]."""
        norm = self.linear_qkv.query_norm
        columns = F.linear(hidden, self.linear_qkv.weight)
        query, key, value = columns.split([len(norm), self.head_dim, self.head_dim], dim=-1)
        normalized = F.rms_norm(query, norm.shape, norm, self.epsilon)
        return [split_heads(self.linear_query_up(normalized), self.head_dim), key[:, None], value[:, None]]


class TensorProductAttention(GroupedAttention):
    """TPA (arXiv 2501.06425): heads (1/R)·Σ_r A_r ⊗ B_r, with A_r over heads and B_r over features."""

    expands_cache = True

    def build_projections(self, config: SASMegatronConfig, fields: dict[str, Any]) -> None:
        """Build the weights of A, by head and factor, and of B, by factor and feature.

        A query that is not factorized has no B.
        """
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

    def factors(self, name: str, hidden: torch.Tensor, rope: RopeCosSin | None) -> torch.Tensor:
        """Return A and B side by side, [B, R, S, N + D]; rotating B rotates all heads."""
        heads, features = self.linear_qkv["heads"], self.linear_qkv["features"]
        of_heads = F.linear(hidden, heads[name]).unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2)
        of_features = split_heads(F.linear(hidden, features[name]), self.head_dim)
        rotated = of_features if rope is None else apply_rope(of_features, rope)
        return torch.cat([of_heads, rotated], dim=-1)

    def combine(self, factors: torch.Tensor) -> torch.Tensor:
        """Return the heads [B, N, S, D] of factors [B, R, S, N + D]."""
        of_heads, of_features = factors.split([self.num_heads, self.head_dim], dim=-1)
        return torch.einsum("brsn,brsd->bnsd", of_heads / factors.shape[1], of_features)

    def project(self, hidden: torch.Tensor, rope: RopeCosSin) -> tuple[torch.Tensor, ...]:
        """Return queries [B, N, S, D], and the factors of keys and of values, which are cached."""
        if "query" in self.ranks:
            query = self.combine(self.factors("query", hidden, rope))
        else:
            columns = F.linear(hidden, self.linear_qkv["heads"]["query"])
            query = apply_rope(split_heads(columns, self.head_dim), rope)
        return query, self.factors("key", hidden, rope), self.factors("value", hidden, None)

    def expand(
        self, key: torch.Tensor, value: torch.Tensor, _rope: RopeCosSin
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Combine the cached factors of keys and of values."""
        return self.combine(key), self.combine(value)


ATTENTIONS: dict[str, type[GroupedAttention]] = {
    "mha": GroupedAttention,
    "gqa": GroupedAttention,
    "mqa": GroupedAttention,
    "diff": DifferentialAttention,
    "mla": LatentAttention,
    "mfa": FactorizedAttention,
    "sas": SimulatedAttention,
    "tpa": TensorProductAttention,
}
