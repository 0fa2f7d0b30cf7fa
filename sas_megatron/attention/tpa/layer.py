"""Tensor product attention as a Megatron-core `SelfAttention`: only what makes its heads changes.

    hidden [S, B, H] -> head factors A    (column parallel: each rank those of its heads)  [S, B, N/P, R]
                     -> feature factors B (whole on every rank, since every head reads them) [S, B, R, D]
      -> heads (1/R)·A·B                                                                   [S, B, N/P, D]
      -> the parent: rotary positions, core attention, output projection

Rotary positions are turned on the heads. That equals turning the feature factors, as the paper writes
it: a rotation is linear and the same for all heads of a token, so Rot(Σ_r A[h, r]·B[r]) is
Σ_r A[h, r]·Rot(B[r]). Factors would save turning N/P heads in place of R rows (fewer heads than
query factors, on many tensor ranks), and a path of our own through the parent's forward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.kv_cache import CachingSelfAttention
from sas_megatron.attention.tpa.config import TensorProductAttentionConfig
from sas_megatron.distributed.gradient_sums import gather_shared_columns, sum_gradients_over_tokens
from sas_megatron.platform.transformer_engine_fallbacks import apply_rope

Factors = dict[str, torch.Tensor]


class HeadFactors(ColumnParallelLinear):
    """A for this rank's heads, and whole queries where those are not factorized, in one product.

    Weights `query`, `key`, `value` [N·R, H], a head's R rows together, so that ranks own whole heads.
    One product, since each would gather the tokens by itself; apart, since each is drawn by its shape.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        attention: TensorProductAttentionConfig,
        config: TransformerConfig,
        **options: Any,
    ) -> None:
        super().__init__(
            hidden_size,
            attention.num_heads * sum(attention.head_widths.values()),
            config=config,
            bias=False,
            skip_weight_param_allocation=True,
            **options,
        )
        self.widths = attention.head_widths
        self.num_heads_local = attention.num_heads // self.tp_group.size()
        for name, width in self.widths.items():
            weight = _empty_weight(self.num_heads_local * width, hidden_size, config)
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=0, stride=1)
            self.register_parameter(name, weight)

    def forward(self, hidden_states: torch.Tensor) -> Factors:
        """[S, B, H], or [S/P, B, H] under sequence parallelism -> [S, B, N/P, R] by name."""
        weights = [self.get_parameter(name) for name in self.widths]
        columns, _ = super().forward(hidden_states, weight=torch.cat(weights))
        parts = columns.split([len(weight) for weight in weights], dim=-1)
        return {
            name: part.unflatten(-1, (self.num_heads_local, width))
            for (name, width), part in zip(self.widths.items(), parts, strict=True)
        }


class FeatureFactors(nn.Module):
    """B, which all heads share, so that each tensor rank needs all of it: weights [R·D, H], replicated.

    Each rank computes it for the tokens it has. Under sequence parallelism that is its own P-th of
    them, and R·D columns are gathered; otherwise all of them, as every rank.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        attention: TensorProductAttentionConfig,
        config: TransformerConfig,
        group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.ranks, self.head_dim = attention.ranks, attention.head_dim
        self.layout: dict[str, Any] = {"group": group, "sequence_parallel": config.sequence_parallel}
        for name, rank in self.ranks.items():
            self.register_parameter(name, _empty_weight(rank * self.head_dim, hidden_size, config))

    def forward(self, hidden_states: torch.Tensor) -> Factors:
        """[S, B, H], or [S/P, B, H] under sequence parallelism -> [S, B, R, D] by name."""
        weights = sum_gradients_over_tokens([self.get_parameter(name) for name in self.ranks], **self.layout)
        columns = gather_shared_columns(F.linear(hidden_states, torch.cat(weights)), **self.layout)
        parts = columns.split([rank * self.head_dim for rank in self.ranks.values()], dim=-1)
        return {
            name: part.unflatten(-1, (rank, self.head_dim))
            for (name, rank), part in zip(self.ranks.items(), parts, strict=True)
        }


class TensorProductFactors(nn.Module):
    """Both kinds of factors, built with the arguments that Megatron-core has for its fused projection."""

    def __init__(
        self,
        hidden_size: int,
        _output_size: int,
        *,
        attention: TensorProductAttentionConfig,
        config: TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        bias: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        del bias  # of `model.linear_bias`, which concerns the output projection alone
        self.heads = HeadFactors(
            hidden_size, attention=attention, config=config, tp_group=tp_group, **options
        )
        self.features = FeatureFactors(hidden_size, attention=attention, config=config, group=tp_group)

    def forward(self, hidden_states: torch.Tensor) -> tuple[Factors, Factors]:
        """[S, B, H], or [S/P, B, H] under sequence parallelism -> A [S, B, N/P, R], B [S, B, R, D]."""
        return self.heads(hidden_states), self.features(hidden_states)


class TensorProductSelfAttention(CachingSelfAttention):
    """Self-attention on heads that are sums of products of factors; `linear_qkv` makes the factors."""

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[S, B, H] -> query, key and value, each [S, B, N/P, D] of this rank."""
        if output_gate or not split_qkv:
            raise NotImplementedError(
                "tensor product attention has no output gate and no fused QKV rotary path"
            )
        heads, features = self.linear_qkv(hidden_states)
        for name, features_SBRD in features.items():
            heads[name] = combine_factors(heads[name], features_SBRD)
        return heads["query"], heads["key"], heads["value"]

    def project(self, hidden_states: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, and both factors of keys and of values; turning a key's features turns all its heads."""
        heads, features = self.linear_qkv(hidden_states)
        query = combine_factors(heads["query"], features["query"]) if "query" in features else heads["query"]
        key = heads["key"], apply_rope(features["key"], angles)
        return apply_rope(query, angles), *key, heads["value"], features["value"]

    def expand(self, kept: list[torch.Tensor], angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads of the kept factors."""
        key_heads, key_features, value_heads, value_features = kept
        return combine_factors(key_heads, key_features), combine_factors(value_heads, value_features)


def combine_factors(heads_SBNR: torch.Tensor, features_SBRD: torch.Tensor) -> torch.Tensor:
    """(1/R) Σ_r A[h, r]·B[r, :] of every token -> [S, B, N, D] (arXiv 2501.06425, section 3.1)."""
    return (heads_SBNR / heads_SBNR.shape[-1]) @ features_SBRD


def build_tensor_product_spec(attention: TensorProductAttentionConfig) -> ModuleSpec:
    """`TensorProductSelfAttention` on the factors of `attention`."""
    return build_self_attention_spec(
        attention,
        module=TensorProductSelfAttention,
        linear_qkv=functools.partial(TensorProductFactors, attention=attention),
    )


def _empty_weight(num_rows: int, num_columns: int, config: TransformerConfig) -> nn.Parameter:
    """Without values: `initialize_weights` draws them whole."""
    device = torch.cuda.current_device()
    return nn.Parameter(torch.empty(num_rows, num_columns, dtype=config.params_dtype, device=device))
