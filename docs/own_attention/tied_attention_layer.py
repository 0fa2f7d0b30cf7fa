"""The layer of tied attention: its projection and the heads that are read from it. The rest is inherited."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from tied_attention import TiedAttentionConfig

from sas_megatron.attention.core import build_self_attention_spec
from sas_megatron.attention.layer import SelfAttentionLayer


class TiedSelfAttention(SelfAttentionLayer):
    """Self-attention whose groups are projected to N/G queries and one key each."""

    def __init__(self, *args: Any, attention: TiedAttentionConfig, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = attention.gain

    @classmethod
    def build_spec(cls, attention: TiedAttentionConfig) -> ModuleSpec:
        """Build the spec of this layer, with a projection of D(N + G) columns."""
        return build_self_attention_spec(
            attention,
            module=cls,
            linear_qkv=functools.partial(_build_projection, attention.projected_width),
            attention=attention,
        )

    def project(
        self, hidden_states: torch.Tensor, rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return queries [S, B, N/P, D], and keys [S, B, G/P, D] without rotary embeddings."""
        columns, _ = self.linear_qkv(hidden_states)
        groups = columns.unflatten(-1, (self.num_query_groups_per_partition, -1))
        width = self.hidden_size_per_attention_head
        query, key = groups.split([groups.shape[-1] - width, width], dim=-1)
        return self.apply_rope(query.flatten(2).unflatten(-1, (-1, width)), rope), key

    def expand(
        self, kept: list[torch.Tensor], rope: torch.Tensor | None, *, is_decoding: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys with rotary embeddings and values of all tokens."""
        (key,) = kept
        return self.apply_rope(key, rope), self.gain * key


def _build_projection(width: int, hidden_size: int, _qkv_width: int, **options: Any) -> ColumnParallelLinear:
    return ColumnParallelLinear(hidden_size, width, **options)
