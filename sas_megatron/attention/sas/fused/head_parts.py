"""Inputs of the fused head simulation: where the heads are among the projected columns, and their weights.

This module imports no Triton, so that it can be imported without the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sas_megatron.attention.sas.simulated_attention import ResidualMapWeights


class HeadColumns(NamedTuple):
    """Columns of the base heads of query, key or value within a token's projected columns.

    Megatron-core's projection orders the columns by group: the queries, the key and the value of the first
    group, then of the second, and so on.
    """

    # First column of the first head.
    first: int
    num_heads: int
    # Heads per group, and columns from one group to the next.
    per_group: int
    group_width: int
    head_dim: int

    def of(self, columns_TW: torch.Tensor) -> torch.Tensor:
        """Return a view [T, groups, heads of a group, D] of contiguous columns [T, W], W = (N+2G)·D."""
        groups = columns_TW.view(columns_TW.shape[0], -1, self.group_width // self.head_dim, self.head_dim)
        return groups.narrow(2, self.first // self.head_dim, self.per_group)


class HeadPart(NamedTuple):
    """One of query, key and value: its columns, its weights, and the base heads of this rank."""

    columns: HeadColumns
    # None: the heads are not simulated, and are returned as they are.
    weights: ResidualMapWeights | None
    base_heads: slice

    @property
    def blocks(self) -> int:
        """r, the number of simulated heads per base head; 1 without a simulation."""
        return 1 if self.weights is None else self.weights.expand.shape[0] // self.columns.num_heads

    @property
    def num_wanted(self) -> int:
        """Number of base heads of this rank."""
        return int(self.base_heads.stop - self.base_heads.start)
