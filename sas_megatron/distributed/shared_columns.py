"""Columns that the heads of all tensor ranks read: each rank computes them for the tokens it has.

Under sequence parallelism those are its own P-th, so the columns are gathered, and the gradients of
their weights are partial sums over the tokens. Otherwise they are all tokens, on every rank alike, and
what has to be summed is the gradient of the columns, since each rank's heads give a part of it; the
weights' gradients are then whole, and equal, on every rank.

Computing them from gathered tokens would repeat the whole product on every rank instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from sas_megatron.distributed.gradient_sums import sum_gradients_over


def weights_for_own_tokens(
    weights: Sequence[torch.Tensor], *, group: dist.ProcessGroup, sequence_parallel: bool
) -> tuple[torch.Tensor, ...]:
    """Replicated weights to use on the tokens at hand, their gradients summed over the ranks' tokens."""
    return sum_gradients_over(group, weights) if sequence_parallel else tuple(weights)


def hand_to_heads(
    columns: torch.Tensor, *, group: dist.ProcessGroup, sequence_parallel: bool
) -> torch.Tensor:
    """[S, B, K], or [S/P, B, K] under sequence parallelism -> [S, B, K] for the heads of this rank.

    The gradients that come back from the heads of all ranks are added up.
    """
    handed: torch.Tensor = (
        gather_from_sequence_parallel_region(columns, group=group)
        if sequence_parallel
        else copy_to_tensor_model_parallel_region(columns, group=group)
    )
    return handed
