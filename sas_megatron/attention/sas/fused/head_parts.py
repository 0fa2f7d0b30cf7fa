"""What the head simulation is to compute: of which columns, with which weights, which heads."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights


class HeadColumns(NamedTuple):
    """Where heads lie among projected columns: in groups of `per_group`, each group so many columns wide."""

    first: int
    num_heads: int
    per_group: int
    group_width: int
    head_dim: int

    def of(self, columns_TC: torch.Tensor) -> torch.Tensor:
        """[T, C], contiguous -> [T, groups, heads of a group, D], a view."""
        groups = columns_TC.view(columns_TC.shape[0], -1, self.group_width // self.head_dim, self.head_dim)
        return groups.narrow(2, self.first // self.head_dim, self.per_group)


class HeadPart(NamedTuple):
    """One of query, key and value: its columns, its weights (None: passed on), and the base heads wanted."""

    columns: HeadColumns
    weights: ResidualMapWeights | None
    base_heads: slice

    @property
    def blocks(self) -> int:
        """r, simulated heads for each base head; 1 where they are passed on."""
        return 1 if self.weights is None else self.weights.expand.shape[0] // self.columns.num_heads

    @property
    def num_wanted(self) -> int:
        """Base heads wanted."""
        return int(self.base_heads.stop - self.base_heads.start)
