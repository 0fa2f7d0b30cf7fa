"""Context parallelism around the attention: an exchange of tokens for heads (Ulysses, arXiv 2309.14509).

    [S/C, B, M, D]   local tokens of all heads
      -> `gather_tokens`  (all-to-all)  -> [S, B, M/C, D]   all tokens of the local heads
      -> attention
      -> `scatter_tokens` (all-to-all)  -> [S/C, B, M, D]

The rest of a layer, including the SAS simulation, works on each token separately and needs no exchange.

SAS has M = r·N heads (r blocks of N). If C divides N, a rank gets the same base heads of every block, so the
PEAA mean over the blocks is taken before `scatter_tokens`, which then sends r times less. If C exceeds N, or
if that needs many copies of key heads, a rank gets consecutive heads, and the mean is taken after the
exchange. If there are too few key heads, the fewest copies are sent (`costs/head_sharding.py`).

Elements sent per local token in forward (the same in backward) on P tensor ranks, without copies:
(C-1)/C · [r(N+G)E + rGD + ND]/P, with rND instead of ND if the mean is taken after the exchange.

Megatron-core gives rank c the chunks c and 2C-1-c of 2C (a zigzag that balances ring attention). The tokens
are sorted into text order for the attention and back into the zigzag order afterwards.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all


class ContextExchange:
    """The exchange of [S/C, B, M, D] for [S, B, M/C, D] over a context group of C ranks, and its inverse."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = group.size()

    def gather_tokens(self, heads_SBMD_local: torch.Tensor, *, num_blocks: int) -> torch.Tensor:
        """Return all tokens of the local heads, [S/C, B, M, D] -> [S, B, M/C, D], in text order.

        All-to-all in forward and backward.

        Args:
            heads_SBMD_local: `num_blocks` consecutive blocks of heads.
            num_blocks: Each rank gets 1/C of every block.
        """
        blocks = heads_SBMD_local.unflatten(2, (num_blocks, self.num_ranks, -1))
        by_rank = blocks.movedim(3, 0).flatten(3, 4)
        received: torch.Tensor = all_to_all(self.group, by_rank.flatten(0, 1).contiguous())
        chunks = received.chunk(2 * self.num_ranks)
        return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])

    def scatter_tokens(self, heads_SBMD: torch.Tensor) -> torch.Tensor:
        """Return the local tokens of all heads, [S, B, M/C, D] -> [S/C, B, M, D].

        All-to-all in forward and backward. The argument is one block of heads, with its tokens in text order.
        """
        chunks = heads_SBMD.chunk(2 * self.num_ranks)
        zigzag = torch.cat([chunks[index] for rank in range(self.num_ranks) for index in (rank, -1 - rank)])
        received: torch.Tensor = all_to_all(self.group, zigzag)
        return torch.cat(received.chunk(self.num_ranks), dim=2)
