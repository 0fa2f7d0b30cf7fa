"""SAS as a Megatron-core `SelfAttention`: only what the query, key and value are changes here.

    hidden [S, B, H] -> linear_qkv (column parallel) -> columns [T, (N+2G)·D/P], T = S·B
      -> exchange: every head, for the tokens at hand
      -> simulate heads (query, key, value), keep or send home this rank's  [T, r·N/P, D]
      -> simulate features (query, key)                                     [T, r·N/P, E]
      -> the parent: rotary positions (if the kernels have not turned the features already), core
         attention (ends in PEAA's mean), output projection

Features are simulated after the heads are home: they concern one head each, so it costs the same
there, and D features a head travel in place of E.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.random import checkpoint
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from sas_megatron.attention.kv_cache import CachingSelfAttention
from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.exchange_choice import choose_exchange
from sas_megatron.attention.sas.feature_simulation import FeatureSimulation, simulate_features
from sas_megatron.attention.sas.fused.residual_weights import ResidualMapWeights
from sas_megatron.attention.sas.head_simulation import HeadSimulation, simulate_heads
from sas_megatron.attention.sas.residual_map import ResidualMap
from sas_megatron.attention.sas.simulation_kernels import NAMES, HeadSource, build_simulation_kernels
from sas_megatron.distributed.gradient_sums import sum_gradients_over
from sas_megatron.distributed.head_exchange import build_head_exchange
from sas_megatron.platform.transformer_engine_fallbacks import apply_rope

# What makes a pass another than that over whole sequences, whose positions the parent knows better.
NOT_TURNED_BY_KERNELS = ("inference_context", "inference_params", "packed_seq_params", "key_value_states")


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


class SimulatedSelfAttention(CachingSelfAttention):
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
        device = torch.cuda.current_device()
        self.simulation = Simulation(attention, dtype=config.params_dtype, device=device)
        self.kernels = build_simulation_kernels(attention, dtype=config.params_dtype)
        strategy = choose_exchange(attention, tensor_parallel=self.tp_group.size())
        self.exchange = build_head_exchange(strategy, self.tp_group)
        self.gathering = build_head_exchange("gather", self.tp_group)
        self.recomputes_simulation = (
            config.recompute_granularity == "selective" and "simulation" in config.recompute_modules
        )
        # Between `forward` and `get_query_key_value_tensors`, which the parent calls in between.
        self._angles: torch.Tensor | None = None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        rotary_pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As the parent, which turns queries and keys where the simulation's kernels do not."""
        self._angles = None
        plain_pass = not args and all(options.get(name) is None for name in NOT_TURNED_BY_KERNELS)
        if self._kernels_turn and plain_pass and isinstance(rotary_pos_emb, torch.Tensor):
            self._angles, rotary_pos_emb = rotary_pos_emb, None
        output, bias = super().forward(
            hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **options
        )
        return output, bias

    @property
    def _kernels_turn(self) -> bool:
        return self.kernels.turns and self.attention.simulate_features

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
        simulate = functools.partial(self._simulate, self._angles)
        if self.recomputes_simulation and self.training:
            # Keeps the projected heads, 1/r or less of what the simulation makes of them.
            query, key, value = checkpoint(simulate, False, *base)
        else:
            query, key, value = simulate(*base)
        return query, key, value

    def _simulate(self, angles: torch.Tensor | None, *base: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Projected columns [S, B, C/P], or query, key and value with base heads -> the simulated three."""
        weights = self.simulation.summed_weights(self.tp_group)
        places = base[0].shape[:2]
        heads, source = [part.flatten(0, 1) for part in base], None
        if self.attention.simulates_heads:
            heads, source = self._simulated_heads(heads[0], weights)
        three = {
            name: part if f"heads.{name}" in weights else part.repeat(1, self.attention.head_expansion, 1)
            for name, part in zip(NAMES, heads, strict=True)
        }
        if self.attention.simulate_features:
            for name in ("query", "key"):
                three[name] = self.kernels.features(name, three[name], weights, angles=angles, source=source)
        return tuple(part.unflatten(0, places) for part in three.values())

    def _simulated_heads(
        self, projected_TC: torch.Tensor, weights: dict[str, ResidualMapWeights]
    ) -> tuple[list[torch.Tensor], HeadSource | None]:
        """Query, key and value [T, heads of this rank, D], all copies of simulated ones; and their source."""
        columns_TC = self.exchange.gather_columns(projected_TC)
        here = self.exchange.base_heads_to_simulate
        simulated = self.kernels.heads(columns_TC, weights, here)
        num_blocks = [self.attention.head_expansion if f"heads.{name}" in weights else 1 for name in NAMES]
        own = self.exchange.scatter_heads(simulated, num_blocks=num_blocks, num_tokens=projected_TC.shape[0])
        return own, None if self.exchange.sends_heads else HeadSource(columns_TC, here)

    def project(self, hidden_states: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, and by `kv_cache` every base key and value, or this rank's simulated ones.

        Base ones are kept by each tensor rank, all of them: its simulated heads are made of all, and to
        gather those of all tokens before at every step would be to send the cache each time.
        """
        columns, _ = self.linear_qkv(hidden_states)
        heads = self.kernels.split_columns(self.gathering.gather_columns(columns.flatten(0, 1)))
        query, *kept = (part.unflatten(0, columns.shape[:2]) for part in heads)
        query = apply_rope(self._simulate_own("query", query), angles)
        if self.attention.kv_cache == "simulated":
            return query, *self._simulate_key_value(kept, angles)
        return query, *kept

    def expand(self, kept: list[torch.Tensor], angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's simulated keys and values."""
        if self.attention.kv_cache == "base":
            return self._simulate_key_value(kept, angles)
        return super().expand(kept, angles)

    def _simulate_key_value(
        self, base: list[torch.Tensor], angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = base
        return apply_rope(self._simulate_own("key", key), angles), self._simulate_own("value", value)

    def _simulate_own(self, name: str, heads_SBCD: torch.Tensor) -> torch.Tensor:
        """All base heads of the query, key or value -> this rank's simulated ones [S, B, r·C/P, E or D]."""
        maps: Any = self.simulation.heads
        features: Any = self.simulation.features
        own = self.gathering.local_base_heads(heads_SBCD.shape[2])
        if name in maps:
            simulated = simulate_heads(heads_SBCD.flatten(0, 1), maps[name].weights(), base_heads=own)
            heads = simulated.unflatten(0, heads_SBCD.shape[:2])
        else:
            heads = heads_SBCD[:, :, own].repeat(1, 1, self.attention.head_expansion, 1)
        return simulate_features(heads, features[name].weights()) if name in features else heads
