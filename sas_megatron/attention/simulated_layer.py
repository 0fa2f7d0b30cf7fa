"""SAS as a Megatron-core `SelfAttention`: only what the query, key and value are changes here.

    hidden [S, B, H] -> linear_qkv (column parallel) -> columns [T, (N+2G)·D/P], T = S·B
      -> exchange: every head, for the tokens at hand
      -> simulate heads (query, key, value), keep or send home this rank's  [T, r·N/P, D]
      -> simulate features (query, key)                                     [T, r·N/P, E]
      -> the parent: rotary positions, core attention (ends in PEAA's mean), output projection

Features are simulated after the heads are home: they concern one head each, so it costs the same
there, and D features a head travel in place of E.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from sas_megatron.attention.exchange_choice import choose_exchange
from sas_megatron.attention.feature_simulation import FeatureSimulation, simulate_features
from sas_megatron.attention.head_simulation import HeadSimulation, simulate_heads
from sas_megatron.attention.residual_map import ResidualMap
from sas_megatron.attention.simulated import SimulatedAttentionConfig
from sas_megatron.kernels.residual_weights import ResidualMapWeights
from sas_megatron.parallel.gradients import sum_gradients_over
from sas_megatron.parallel.head_exchange import build_head_exchange


class Simulation(nn.Module):
    """All simulation weights of a layer: those of heads by `query`, `key`, `value`, and of features."""

    def __init__(
        self, attention: SimulatedAttentionConfig, *, dtype: torch.dtype, device: torch.device | int
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": attention.simulation_bias, "dtype": dtype, "device": device}
        self.heads = nn.ModuleDict(
            {
                name: HeadSimulation(
                    num_heads,
                    expansion=attention.head_expansion,
                    kernel_size=attention.kernel_size,
                    **options,
                )
                for name, num_heads in attention.head_simulations().items()
            }
        )
        self.features = nn.ModuleDict(
            {
                name: FeatureSimulation(
                    attention.head_dim,
                    simulated_head_dim=attention.query_key_dim,
                    random_extra_features=name == "query",
                    **options,
                )
                for name in ("query", "key")
                if attention.simulate_features
            }
        )

    def summed_weights(self, group: torch.distributed.ProcessGroup) -> dict[str, ResidualMapWeights]:
        """Weights by `heads.query`, `features.key` and so on, whose gradients sum over the tensor group."""
        maps = {name: part for name, part in self.named_modules() if isinstance(part, ResidualMap)}
        given = [weight for part in maps.values() for weight in part.weights() if weight is not None]
        summed = iter(sum_gradients_over(group, given))
        return {
            name: ResidualMapWeights(
                # None only where the map itself has none, which is a bias.
                *(None if weight is None else next(summed) for weight in part.weights())  # type: ignore[arg-type]
            )
            for name, part in maps.items()
        }


class SimulatedSelfAttention(SelfAttention):
    """Self-attention whose queries, keys and values are simulated from a compact projection.

    The same function, with the same gradients, at every tensor-parallel size. Needs a core
    attention that averages the `head_expansion` blocks (`SimulatedAttentionConfig.build_spec`).
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
        self.simulation = Simulation(attention, dtype=config.params_dtype, device=torch.cuda.current_device())
        strategy = choose_exchange(attention, tensor_parallel=self.tp_group.size())
        self.exchange = build_head_exchange(strategy, self.tp_group)
        self.recomputes_simulation = (
            config.recompute_granularity == "selective" and "simulation" in config.recompute_modules
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[S, B, H] -> query [S, B, r·N/P, E], key [S, B, r·G/P, E], value [S, B, r·G/P, D] of this rank."""
        if output_gate or not split_qkv:
            raise NotImplementedError("SAS has neither an output gate nor a fused QKV rotary path")
        if self.attention.simulates_heads:
            base = self.linear_qkv(hidden_states)[:1]
        else:
            base = super().get_query_key_value_tensors(hidden_states)
        if self.recomputes_simulation and self.training:
            # Keeps the projected heads, 1/r or less of what the simulation makes of them.
            query, key, value = checkpoint(self._simulate, False, *base)
        else:
            query, key, value = self._simulate(*base)
        return query, key, value

    def _simulate(self, *base: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Projected columns [S, B, C/P], or query, key and value with base heads -> the simulated three."""
        weights = self.simulation.summed_weights(self.tp_group)
        if self.attention.simulates_heads:
            base = tuple(self._simulated_heads(base[0], weights))
        query, key, value = (
            heads if f"heads.{name}" in weights else heads.repeat(1, 1, self.attention.head_expansion, 1)
            for name, heads in zip(("query", "key", "value"), base, strict=True)
        )
        if self.attention.simulate_features:
            query = simulate_features(query, weights["features.query"])
            key = simulate_features(key, weights["features.key"])
        return query, key, value

    def _simulated_heads(
        self, projected: torch.Tensor, weights: dict[str, ResidualMapWeights]
    ) -> list[torch.Tensor]:
        """Query, key and value [S, B, heads of this rank, D]; simulated ones with r times the heads."""
        num_tokens = projected.shape[0] * projected.shape[1]
        columns_TC = self.exchange.all_columns(projected.flatten(0, 1))

        simulated, num_blocks = [], []
        for name, heads_TCD in zip(("query", "key", "value"), self._split_columns(columns_TC), strict=True):
            here = self.exchange.base_heads_here(heads_TCD.shape[1])
            if f"heads.{name}" in weights:
                simulated.append(simulate_heads(heads_TCD, weights[f"heads.{name}"], base_heads=here))
                num_blocks.append(self.attention.head_expansion)
            else:
                simulated.append(heads_TCD[:, here])
                num_blocks.append(1)
        own = self.exchange.my_heads(simulated, num_blocks=num_blocks, num_tokens=num_tokens)
        return [heads.unflatten(0, projected.shape[:2]) for heads in own]

    def _split_columns(self, columns_TC: torch.Tensor) -> list[torch.Tensor]:
        """[T, (N+2G)·D] in Megatron-core's order (each group's queries, key, value) -> [T, N | G | G, D]."""
        groups = self.attention.num_key_value_heads
        queries = self.attention.num_heads // groups
        grouped = columns_TC.view(-1, groups, queries + 2, self.attention.head_dim)
        return [part.flatten(1, 2) for part in grouped.split([queries, 1, 1], dim=2)]
