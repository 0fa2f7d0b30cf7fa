"""Tied attention's layer: what is projected, and how heads are read from it; the rest is Megatron-core's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from tied_attention import TiedAttentionConfig

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.kv_cache import CachingSelfAttention
from sas_megatron.platform.transformer_engine_fallbacks import apply_rope


class TiedSelfAttention(CachingSelfAttention):
    """Self-attention whose groups are projected as N/G queries and one key."""

    def __init__(self, *args: Any, attention: TiedAttentionConfig, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = attention.gain

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[S, B, H] -> query [S, B, N/P, D], key and value [S, B, G/P, D] of this rank."""
        columns, _ = self.linear_qkv(hidden_states)
        groups = columns.unflatten(-1, (self.num_query_groups_per_partition, -1))
        width = self.hidden_size_per_attention_head
        query, key = groups.split([groups.shape[-1] - width, width], dim=-1)
        return query.flatten(2).unflatten(-1, (-1, width)), key, self.gain * key

    def project(self, hidden_states: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, and the one thing that decoding keeps: keys before their positions turn them.

        (Without this and `expand` it would keep turned keys and values, and decode as well.)
        """
        query, key, _ = self.get_query_key_value_tensors(hidden_states)
        return apply_rope(query, angles), key

    def expand(self, kept: list[torch.Tensor], angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens."""
        (key,) = kept
        return apply_rope(key, angles), self.gain * key


def build_tied_spec(attention: TiedAttentionConfig) -> ModuleSpec:
    """`TiedSelfAttention` on a projection of D(N + G) columns."""
    width = attention.head_dim * (attention.num_heads + attention.num_key_value_heads)
    return build_self_attention_spec(
        attention,
        module=TiedSelfAttention,
        linear_qkv=functools.partial(_project, width),
        attention=attention,
    )


def _project(width: int, hidden_size: int, _qkv_width: int, **options: Any) -> ColumnParallelLinear:
    return ColumnParallelLinear(hidden_size, width, **options)
