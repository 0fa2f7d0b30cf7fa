"""Tensor product attention as a Megatron-core `SelfAttention`.

    hidden [S, B, H] -> head factors A    (column-parallel over the heads)          [S, B, N/P, R]
                     -> feature factors B (replicated, since every head reads them)  [S, B, R, D]
      -> heads (1/R)·A·B                                                            [S, B, N/P, D]
      -> rotary embeddings, core attention, output projection

In training, rotary embeddings are applied to the heads. When decoding, they are applied to the feature
factors of the key, which are cached. Both give the same keys, since a rotation is linear and the same for all
heads of a token: Rot(Σ_r A[h, r]·B[r]) = Σ_r A[h, r]·Rot(B[r]).
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
from typing_extensions import override

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.layer import SelfAttentionLayer
from sas_megatron.attention.tpa.config import TensorProductAttentionConfig
from sas_megatron.distributed.gradient_sums import gather_shared_columns, sum_gradients_over_tokens

Factors = dict[str, torch.Tensor]


class HeadFactors(ColumnParallelLinear):
    """The projection to A of this rank's heads, and to queries if they are not factorized, as one product.

    Weights `query`, `key`, `value` [N·R, H], with the R rows of a head next to each other, so that each rank
    owns complete heads. One product gathers the tokens only once under sequence parallelism; separate weights
    are initialized by their own shapes.
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
        """Project [S, B, H], or [S/P, B, H] under sequence parallelism, to [S, B, N/P, R] by name."""
        weights = [self.get_parameter(name) for name in self.widths]
        columns, _ = super().forward(hidden_states, weight=torch.cat(weights))
        parts = columns.split([len(weight) for weight in weights], dim=-1)
        return {
            name: part.unflatten(-1, (self.num_heads_local, width))
            for (name, width), part in zip(self.widths.items(), parts, strict=True)
        }


class FeatureFactors(nn.Module):
    """The projection to B, which all heads share: weights [R·D, H], replicated over the tensor ranks.

    Each rank computes B of the tokens that it holds. Under sequence parallelism these are 1/P of the tokens,
    and R·D columns are all-gathered; otherwise they are all tokens, on every rank.
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
        """Project [S, B, H], or [S/P, B, H] under sequence parallelism, to [S, B, R, D] by name."""
        weights = sum_gradients_over_tokens([self.get_parameter(name) for name in self.ranks], **self.layout)
        columns = gather_shared_columns(F.linear(hidden_states, torch.cat(weights)), **self.layout)
        parts = columns.split([rank * self.head_dim for rank in self.ranks.values()], dim=-1)
        return {
            name: part.unflatten(-1, (rank, self.head_dim))
            for (name, rank), part in zip(self.ranks.items(), parts, strict=True)
        }


class TensorProductFactors(nn.Module):
    """The projections to both kinds of factors, which replace Megatron-core's fused projection."""

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
        del bias  # `model.linear_bias` applies to the output projection only
        self.heads = HeadFactors(
            hidden_size, attention=attention, config=config, tp_group=tp_group, **options
        )
        self.features = FeatureFactors(hidden_size, attention=attention, config=config, group=tp_group)

    def forward(self, hidden_states: torch.Tensor) -> tuple[Factors, Factors]:
        """Project [S, B, H], or [S/P, B, H] under sequence parallelism, to A [S, B, N/P, R] and B."""
        return self.heads(hidden_states), self.features(hidden_states)


class TensorProductSelfAttention(SelfAttentionLayer):
    """Self-attention whose heads are sums of products of factors, which `linear_qkv` projects."""

    @classmethod
    @override
    def build_spec(cls, attention: TensorProductAttentionConfig) -> ModuleSpec:
        return build_self_attention_spec(
            attention, module=cls, linear_qkv=functools.partial(TensorProductFactors, attention=attention)
        )

    @override
    def project(
        self, hidden_states: torch.Tensor, rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return queries, and both factors of keys and values (when decoding, with rotated key features)."""
        heads, features = self.linear_qkv(hidden_states)
        query = combine_factors(heads["query"], features["query"]) if "query" in features else heads["query"]
        key_features = self.apply_rope(features["key"], rope) if is_decoding else features["key"]
        return (
            self.apply_rope(query, rope),
            heads["key"],
            key_features,
            heads["value"],
            features["value"],
        )

    @override
    def expand(
        self, kept: list[torch.Tensor], rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Combine the factors of keys and values."""
        key_heads, key_features, value_heads, value_features = kept
        key = combine_factors(key_heads, key_features)
        value = combine_factors(value_heads, value_features)
        return key if is_decoding else self.apply_rope(key, rope), value


def combine_factors(heads_SBNR: torch.Tensor, features_SBRD: torch.Tensor) -> torch.Tensor:
    """Return (1/R) Σ_r A[h, r]·B[r, :] of every token, [S, B, N, D] (arXiv 2501.06425, section 3.1)."""
    return (heads_SBNR / heads_SBNR.shape[-1]) @ features_SBRD


def _empty_weight(num_rows: int, num_columns: int, config: TransformerConfig) -> nn.Parameter:
    """Return an uninitialized weight; `initialize_weights` sets its values."""
    device = torch.cuda.current_device()
    return nn.Parameter(torch.empty(num_rows, num_columns, dtype=config.params_dtype, device=device))
