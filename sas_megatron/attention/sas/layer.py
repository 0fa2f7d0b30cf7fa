"""SAS as a Megatron-core `SelfAttention`: only the queries, keys and values differ.

    hidden [S, B, H] -> linear_qkv (column-parallel) -> columns [T, (N+2G)·D/P], T = S·B
      -> exchange over tensor ranks: the columns of all heads
      -> head simulation (query, key, value); each rank keeps or receives its local heads  [T, r·N/P, D]
      -> feature simulation (query, key)                                                   [T, r·N/P, E]
      -> rotary embeddings, unless the kernels apply them (`rotary=before`: on base heads, after the exchange)
      -> core attention with the aggregation of blocks (PEAA), output projection

Features are simulated after the exchange: each head is mapped alone, so this costs the same, and D instead
of E features per head are exchanged.

The simulation's weights are replicated over the tensor ranks, and each rank computes with them for a part of
the heads or tokens. Its gradient of each weight is therefore a partial sum. `sum_weight_gradients` passes the
weights through an identity whose backward pass all-reduces the gradients over the tensor group, so that every
rank has the full gradient, under every engine.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from typing_extensions import override

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.layer import SelfAttentionLayer
from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights, Simulation
from sas_megatron.attention.sas.simulation_kernels import (
    NAMES,
    HeadSource,
    build_simulation,
    build_simulation_kernels,
    check_kernel,
)
from sas_megatron.attention.sas.tensor_parallel import HeadExchange, build_head_exchange, choose_exchange
from sas_megatron.distributed.gradient_sums import sum_gradients_over


def sum_weight_gradients(
    simulation: Simulation, group: torch.distributed.ProcessGroup
) -> dict[str, ResidualMapWeights]:
    """Return the weights of a simulation by map, with gradients that are summed over the tensor group."""
    maps = simulation.weights()
    present = [weight for weights in maps.values() for weight in weights if weight is not None]
    summed = iter(sum_gradients_over(group, present))
    return {
        name: ResidualMapWeights(
            # Only biases may be None.
            *(None if weight is None else next(summed) for weight in weights)  # type: ignore[arg-type]
        )
        for name, weights in maps.items()
    }


class SimulatedSelfAttention(SelfAttentionLayer):
    """Self-attention with heads simulated from few; results do not depend on the number of tensor ranks."""

    def __init__(
        self, config: TransformerConfig, *args: Any, attention: SimulatedAttentionConfig, **options: Any
    ) -> None:
        super().__init__(config, *args, **options)
        self.attention = attention
        device = torch.cuda.current_device()
        self.simulation = build_simulation(attention, dtype=config.params_dtype, device=device)
        self.kernels = build_simulation_kernels(attention, dtype=config.params_dtype)
        strategy = choose_exchange(attention, tensor_parallel=self.tp_group.size())
        self.exchange = build_head_exchange(strategy, self.tp_group)
        self.gather = build_head_exchange("gather", self.tp_group)
        self.recomputes_simulation = "simulation" in config.recompute_modules

    @classmethod
    @override
    def build_spec(cls, attention: SimulatedAttentionConfig) -> ModuleSpec:
        check_kernel(attention)
        return build_self_attention_spec(
            attention, module=cls, aggregation=attention.aggregation, attention=attention
        )

    @override
    def project(
        self, hidden_states: torch.Tensor, rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return simulated queries, keys and values of this rank, or base keys and values for the KV cache.

        The KV cache of `kv_cache=base` has all base heads on each tensor rank, since the simulated heads of a
        rank depend on all of them; gathering all tokens' heads in each step would send the full cache.
        """
        if is_decoding and self.attention.kv_cache == "base":
            return self._project_base(hidden_states, rope)
        if self.attention.simulates_heads:
            base = self.linear_qkv(hidden_states)[:1]
        else:
            base = self.get_query_key_value_tensors(hidden_states)
        # The kernels need the same positions in all sequences, which decoding and segments do not have.
        is_shared = rope is None or rope.shape[1] == 1
        kernels_apply_rope = self.kernels.applies_rope and is_shared and not is_decoding
        base_rope, rope = self._split_rope(rope)
        simulate = functools.partial(
            self._simulate,
            base_rope=base_rope,
            feature_rope=rope if kernels_apply_rope else None,
            exchange=self.gather if is_decoding else self.exchange,
        )
        if self.recomputes_simulation and self.training:
            # Saves the projected heads, which are 1/r or less of the simulated ones.
            query, key, value = checkpoint(simulate, False, *base)
        else:
            query, key, value = simulate(*base)
        if kernels_apply_rope:
            return query, key, value
        return self.apply_rope(query, rope), self.apply_rope(key, rope), value

    @override
    def expand(
        self, kept: list[torch.Tensor], rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's simulated keys and values, which are computed here from cached base heads."""
        key, value = kept
        if not is_decoding or self.attention.kv_cache == "simulated":
            return key, value
        _, rope = self._split_rope(rope)
        return self.apply_rope(self._simulate_local("key", key), rope), self._simulate_local("value", value)

    @property
    @override
    def expands_cache(self) -> bool:
        return self.attention.kv_cache == "base"

    def _split_rope(self, rope: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the rotary angles of base heads and those of simulated heads, one of which is None."""
        return (rope, None) if self.attention.rotary == "before" else (None, rope)

    def _project_base(
        self, hidden_states: torch.Tensor, rope: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Return simulated queries of this rank, and all base keys, with `before` rotated, and values."""
        columns, _ = self.linear_qkv(hidden_states)
        heads = self.kernels.split_columns(self.gather.gather_columns(columns.flatten(0, 1)))
        query, key, value = (part.unflatten(0, columns.shape[:2]) for part in heads)
        base_rope, rope = self._split_rope(rope)
        query, key = self.apply_rope(query, base_rope), self.apply_rope(key, base_rope)
        return self.apply_rope(self._simulate_local("query", query), rope), key, value

    def _simulate_local(self, name: str, heads_SBND: torch.Tensor) -> torch.Tensor:
        """Simulate this rank's heads [S, B, r·N/P, E or D] from all base heads of the query, key or value."""
        local = self.gather.local_base_heads(heads_SBND.shape[2])
        simulated = self.simulation(name, heads_SBND.flatten(0, 1), base_heads=local)
        return torch.unflatten(simulated, 0, heads_SBND.shape[:2])

    def _simulate(
        self,
        *base: torch.Tensor,
        base_rope: torch.Tensor | None,
        feature_rope: torch.Tensor | None,
        exchange: HeadExchange,
    ) -> tuple[torch.Tensor, ...]:
        """Simulate query, key and value from projected columns [S, B, W/P], or from local base heads.

        Rotary angles [S, 1 or B, 1, R] apply to base heads, or in the kernels of the feature simulation.
        """
        weights = sum_weight_gradients(self.simulation, self.tp_group)
        shape = base[0].shape[:2]
        if self.attention.simulates_heads:
            angles = None if base_rope is None else base_rope.expand(-1, shape[1], -1, -1).flatten(0, 1)
            heads, source = self._exchange_and_simulate(base[0].flatten(0, 1), weights, exchange, angles)
        else:
            rotated = *(self.apply_rope(part, base_rope) for part in base[:2]), base[2]
            heads, source = [part.flatten(0, 1) for part in rotated], None
        simulated = {
            name: part if f"heads.{name}" in weights else part.repeat(1, self.attention.head_expansion, 1)
            for name, part in zip(NAMES, heads, strict=True)
        }
        if self.attention.simulate_features:
            for name in ("query", "key"):
                simulated[name] = self.kernels.features(
                    name, simulated[name], weights, rope=feature_rope, source=source
                )
        return tuple(part.unflatten(0, shape) for part in simulated.values())

    def _exchange_and_simulate(
        self,
        columns_TW_local: torch.Tensor,
        weights: dict[str, ResidualMapWeights],
        exchange: HeadExchange,
        angles_T1R: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], HeadSource | None]:
        """Return query, key and value [T, local heads, D] after head simulation, and their source.

        Heads that are not simulated have one copy. The source is None if other ranks computed the heads.
        Rotary angles, if any, apply to base queries and keys.
        """
        columns_TW = exchange.gather_columns(columns_TW_local)
        if angles_T1R is not None:
            angles = angles_T1R[exchange.own_tokens(len(angles_T1R))].unsqueeze(1)
            columns_TW = self.kernels.rotate_columns(
                columns_TW, lambda heads_TND: self.apply_rope(heads_TND.unsqueeze(1), angles)
            )
        computed_heads = exchange.base_heads_to_simulate
        simulated = self.kernels.heads(columns_TW, weights, computed_heads)
        num_blocks = [self.attention.head_expansion if f"heads.{name}" in weights else 1 for name in NAMES]
        local = exchange.scatter_heads(simulated, num_blocks=num_blocks, num_tokens=columns_TW_local.shape[0])
        return local, None if exchange.sends_heads else HeadSource(columns_TW, computed_heads)
