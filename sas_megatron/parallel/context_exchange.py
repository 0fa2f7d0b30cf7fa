"""Context parallelism by trading tokens for heads (Ulysses, arXiv 2309.14509), around the attention.

Each rank of the context group holds S/C tokens of every head. Attention needs all tokens of a head,
so before it every rank trades its tokens of other ranks' heads for their tokens of its own heads,
and trades back after. Everything else of a layer, the simulation of SAS too, is per token.

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

    def gather_tokens(self, heads_SBMD_local: torch.Tensor) -> torch.Tensor:
        """[S/C, B, M, D] -> [S, B, M/C, D], tokens in the order of the text."""
        by_rank = torch.stack(heads_SBMD_local.chunk(self.num_ranks, dim=2))
        received: torch.Tensor = all_to_all(self.group, by_rank.flatten(0, 1))
        return received.index_select(0, self._text_order(received))

    def scatter_tokens(self, heads_SBMD: torch.Tensor) -> torch.Tensor:
        """[S, B, M/C, D] in the order of the text -> [S/C, B, M, D]."""
        order = self._text_order(heads_SBMD)
        zigzag = heads_SBMD.index_select(0, torch.argsort(order))
        received: torch.Tensor = all_to_all(self.group, zigzag)
        return torch.cat(received.chunk(self.num_ranks), dim=2)

    def _text_order(self, tokens_first: torch.Tensor) -> torch.Tensor:
        """Where the tokens of the text lie when the ranks' zigzag shares stand one after another."""
        chunk_of_place = [
            chunk for rank in range(self.num_ranks) for chunk in (rank, 2 * self.num_ranks - 1 - rank)
        ]
        places = torch.arange(tokens_first.shape[0], device=tokens_first.device).view(2 * self.num_ranks, -1)
        return places[torch.argsort(torch.tensor(chunk_of_place, device=tokens_first.device))].flatten()
