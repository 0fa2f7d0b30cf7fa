"""Context parallelism by trading tokens for heads (Ulysses, arXiv 2309.14509), around the attention.

Each rank of the context group holds S/C tokens of every head. Attention needs all tokens of a head,
so before it every rank trades its tokens of other ranks' heads for their tokens of its own heads,
and trades back after. Everything else of a layer, the simulation of SAS too, is per token.

Of SAS's M = r·N heads (r blocks of N) a rank gets, where it can, the same base heads of every block:
PEAA's mean over the blocks is then taken before the trade back, of which r times less is left. Where
the ranks are more than the base heads, it gets consecutive heads, and the mean comes after.

Elements sent per token of a rank's own, forward (backward the same), from P tensor ranks:
(C-1)/C · [r(N+G)E + rGD + ND]/P, with rND in place of ND where the mean comes after.

Megatron-core gives rank c the chunks c and 2C-1-c of 2C (its zigzag balances ring attention); the
tokens are put in order for the attention, and back in the zigzag after it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all


class ContextExchange:
    """Trades [S/C, B, M, D] for [S, B, M/C, D] over a context group of C ranks, and back."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = group.size()

    def gather_tokens(self, heads_SBMD_local: torch.Tensor, *, num_blocks: int) -> torch.Tensor:
        """[S/C, B, M, D] -> [S, B, M/C, D], tokens in the order of the text.

        Args:
            heads_SBMD_local: `num_blocks` blocks of heads, one after the other.
            num_blocks: Each rank gets a C-th of every block.
        """
        blocks = heads_SBMD_local.unflatten(2, (num_blocks, self.num_ranks, -1))
        by_rank = blocks.movedim(3, 0).flatten(3, 4)
        received: torch.Tensor = all_to_all(self.group, by_rank.flatten(0, 1).contiguous())
        chunks = received.chunk(2 * self.num_ranks)
        return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])

    def scatter_tokens(self, heads_SBMD: torch.Tensor) -> torch.Tensor:
        """[S, B, M/C, D] of one block in the order of the text -> [S/C, B, M, D]."""
        chunks = heads_SBMD.chunk(2 * self.num_ranks)
        zigzag = torch.cat([chunks[place] for rank in range(self.num_ranks) for place in (rank, -1 - rank)])
        received: torch.Tensor = all_to_all(self.group, zigzag)
        return torch.cat(received.chunk(self.num_ranks), dim=2)
