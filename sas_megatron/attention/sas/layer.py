"""SAS as a Megatron-core `SelfAttention`: only the queries, keys and values differ.

    hidden [S, B, H] -> linear_qkv (column-parallel) -> columns [T, (N+2G)·D/P], T = S·B
      -> exchange over tensor ranks: the columns of all heads
      -> head simulation (query, key, value); each rank keeps or receives its local heads  [T, r·N/P, D]
      -> feature simulation (query, key)                                                   [T, r·N/P, E]
      -> rotary embeddings (unless the simulation's kernels apply them)
      -> core attention with the aggregation of blocks (PEAA), output projection

With `attention.rotary=before`, the base queries and keys are rotated before head simulation, once each rank
has all columns of its tokens.

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
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from typing_extensions import override

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.layer import SelfAttentionLayer
from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights, Simulation, SimulationShape
from sas_megatron.attention.sas.simulation_kernels import (
    NAMES,
    HeadSource,
    build_simulation_kernels,
    check_kernel,
)
from sas_megatron.attention.sas.tensor_parallel import HeadExchange, build_head_exchange, choose_exchange
from sas_megatron.distributed.gradient_sums import sum_gradients_over


def build_simulation(
    attention: SimulatedAttentionConfig, *, dtype: torch.dtype, device: torch.device | int
) -> Simulation:
    """Build the simulation of a layer, with uninitialized weights."""
    shape = SimulationShape(
        num_heads=attention.head_simulations(),
        expansion=attention.head_expansion,
        kernel_size=attention.kernel_size,
        head_dim=attention.head_dim,
        simulated_head_dim=attention.query_key_dim if attention.simulate_features else None,
        bias=attention.simulation_bias,
        head_activation=attention.head_activation,
        feature_activation=attention.feature_activation,
    )
    return Simulation(shape, dtype=dtype, device=device)


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
    """Self-attention whose queries, keys and values are simulated from few projected heads.

    Outputs and gradients do not depend on the number of tensor ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *args: Any,
        attention: SimulatedAttentionConfig,
        **options: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, *args, **options)
        self.attention = attention
        device = torch.cuda.current_device()
        self.simulation = build_simulation(attention, dtype=config.params_dtype, device=device)
        self.kernels = build_simulation_kernels(attention, dtype=config.params_dtype)
        strategy = choose_exchange(attention, tensor_parallel=self.tp_group.size())
        self.exchange = build_head_exchange(strategy, self.tp_group)
        self.gather = build_head_exchange("gather", self.tp_group)
        self.recomputes_simulation = (
            config.recompute_granularity == "selective" and "simulation" in config.recompute_modules
        )

    @classmethod
    @override
    def build_spec(cls, attention: SimulatedAttentionConfig) -> ModuleSpec:
        check_kernel(attention)
        return build_self_attention_spec(
            attention,
            module=cls,
            num_blocks=attention.head_expansion,
            aggregation=attention.aggregation,
            attention=attention,
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
        # The kernels need the same positions in all sequences, which decoding does not have.
        kernels_apply_rope = (
            self.kernels.applies_rope and self.attention.simulate_features and not is_decoding
        )
        simulate = functools.partial(
            self._simulate,
            base_rope=self._base_rope(rope),
            feature_rope=rope if kernels_apply_rope else None,
            exchange=self.gather if is_decoding else self.exchange,
        )
        if self.recomputes_simulation and self.training:
            # Saves the projected heads, which are 1/r or less of the simulated ones.
            query, key, value = checkpoint(simulate, False, *base)
        else:
            query, key, value = simulate(*base)
        rope = None if kernels_apply_rope else self._simulated_rope(rope)
        return self.apply_rope(query, rope), self.apply_rope(key, rope), value

    @override
    def expand(
        self, kept: list[torch.Tensor], rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's simulated keys and values, which are computed here from cached base heads."""
        key, value = kept
        if is_decoding and self.attention.kv_cache == "base":
            key = self.apply_rope(self._simulate_local("key", key), self._simulated_rope(rope))
            value = self._simulate_local("value", value)
        return key, value

    @property
    @override
    def expands_cache(self) -> bool:
        return self.attention.kv_cache == "base"

    def _base_rope(self, rope: torch.Tensor | None) -> torch.Tensor | None:
        """Return the rotary angles to apply to base heads, if any."""
        return rope if self.attention.rotary == "before" else None

    def _simulated_rope(self, rope: torch.Tensor | None) -> torch.Tensor | None:
        """Return the rotary angles to apply to simulated heads, if any."""
        return None if self.attention.rotary == "before" else rope

    def _project_base(
        self, hidden_states: torch.Tensor, rope: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Return simulated queries of this rank, and all base keys and values [S, B, G, D].

        The base keys have rotary embeddings if these are applied before the simulation.
        """
        columns, _ = self.linear_qkv(hidden_states)
        heads = self.kernels.split_columns(self.gather.gather_columns(columns.flatten(0, 1)))
        query, key, value = (part.unflatten(0, columns.shape[:2]) for part in heads)
        query, key = (self.apply_rope(part, self._base_rope(rope)) for part in (query, key))
        query = self.apply_rope(self._simulate_local("query", query), self._simulated_rope(rope))
        return query, key, value

    def _simulate_local(self, name: str, heads_SBND: torch.Tensor) -> torch.Tensor:
        """Simulate this rank's heads [S, B, r·N/P, E or D] from all base heads of the query, key or value."""
        local = self.gather.local_base_heads(heads_SBND.shape[2])
        simulated = self.simulation(name, heads_SBND.flatten(0, 1), base_heads=local)
        heads: torch.Tensor = simulated.unflatten(0, heads_SBND.shape[:2])
        return heads

    def _simulate(
        self,
        *base: torch.Tensor,
        base_rope: torch.Tensor | None,
        feature_rope: torch.Tensor | None,
        exchange: HeadExchange,
    ) -> tuple[torch.Tensor, ...]:
        """Simulate query, key and value from projected columns [S, B, W/P], or from local base heads.

        Args:
            base: One tensor of columns, or the base heads [S, B, .., D] of query, key and value.
            base_rope: Rotary angles [S, 1 or B, 1, R] to apply to base queries and keys; None to apply none.
            feature_rope: Rotary angles that the kernels of the feature simulation apply; None to apply none.
            exchange: The exchange of heads between tensor ranks.
        """
        weights = sum_weight_gradients(self.simulation, self.tp_group)
        shape, source = base[0].shape[:2], None
        if self.attention.simulates_heads:
            angles = None if base_rope is None else base_rope.expand(-1, shape[1], -1, -1).flatten(0, 1)
            heads, source = self._exchange_and_simulate(base[0].flatten(0, 1), weights, exchange, angles)
        else:
            query, key, value = base
            rotated = (self.apply_rope(query, base_rope), self.apply_rope(key, base_rope), value)
            heads = [part.flatten(0, 1) for part in rotated]
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
        Rotary angles of the T tokens are applied to the base queries and keys, unless they are None.
        """
        columns_TW = exchange.gather_columns(columns_TW_local)
        if angles_T1R is not None:
            columns_TW = self._rotate_columns(columns_TW, angles_T1R[exchange.own_tokens(len(angles_T1R))])
        computed_heads = exchange.base_heads_to_simulate
        simulated = self.kernels.heads(columns_TW, weights, computed_heads)
        num_blocks = [self.attention.head_expansion if f"heads.{name}" in weights else 1 for name in NAMES]
        local = exchange.scatter_heads(simulated, num_blocks=num_blocks, num_tokens=columns_TW_local.shape[0])
        return local, None if exchange.sends_heads else HeadSource(columns_TW, computed_heads)

    def _rotate_columns(self, columns_TW: torch.Tensor, angles_T1R: torch.Tensor) -> torch.Tensor:
        """Apply rotary embeddings to the base queries and keys in projected columns [T, W]."""
        groups = self.attention.num_key_value_heads
        # In each group, the queries and the key precede the value.
        grouped = columns_TW.unflatten(1, (groups, -1, self.attention.head_dim))
        rotary, value = grouped.split([grouped.shape[2] - 1, 1], dim=2)
        rotated = self.apply_rope(rotary.flatten(1, 2).unsqueeze(1), angles_T1R.unsqueeze(1))
        return torch.cat([rotated.view(rotary.shape), value], dim=2).flatten(1)
