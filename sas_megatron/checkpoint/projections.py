"""Megatron-core's fused query, key and value rows, to three projections and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sas_megatron.config.attention import AttentionConfig


def split_projection(fused: torch.Tensor, attention: AttentionConfig) -> list[torch.Tensor]:
    """[(N + 2G)·D, ..], each group's queries, key and value together -> [N·D, ..] and twice [G·D, ..]."""
    groups = attention.num_key_value_heads
    readers = attention.num_heads // groups
    by_group = fused.unflatten(0, (groups, readers + 2, attention.head_dim))
    return [part.flatten(0, 2) for part in by_group.split([readers, 1, 1], dim=1)]


def fuse_projections(parts: Sequence[torch.Tensor], attention: AttentionConfig) -> torch.Tensor:
    """Query, key and value, which `split_projection` takes apart."""
    groups, width = attention.num_key_value_heads, attention.head_dim
    by_group = [part.unflatten(0, (groups, -1, width)) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 2)
