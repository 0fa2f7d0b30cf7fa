"""Parameter-efficient attention aggregation (PEAA): many heads' outputs onto a base-sized projection.

SAS (arXiv 2507.07694): the M = r·N heads are r contiguous blocks of N; each block goes through the
one output projection and the results are averaged. Projection and mean commute, so the mean comes
first here: one projection instead of r.
"""

from __future__ import annotations

import torch


def average_blocks(context_SBMD: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """[S, B, r·N, D] in block-major order -> [S, B, N, D], the mean over the r blocks."""
    if num_blocks == 1:
        return context_SBMD
    blocks_SBrND: torch.Tensor = context_SBMD.unflatten(2, (num_blocks, -1))
    return blocks_SBrND.mean(dim=2)
