"""How the head simulation, which reads every head, gets them when each tensor rank owns a few.

    projected [T, C/P]                 all tokens, my columns (what the column-parallel QKV leaves)
      -> `all_columns` [T', C]         T' tokens with the columns of every rank
      -> simulate heads (replicated weights, no communication)
      -> `my_heads` [T, m/P, D] each all tokens, my simulated heads

Two strategies send different bytes. **gather** keeps all tokens (T' = T): every rank repeats the
first convolution for all heads, and computes its own simulated heads in the second. **all_to_all**
keeps a P-th of the tokens (T' = T/P) and all heads, and sends the simulated heads back: nothing is
computed twice, which works because the simulation is per token.

Elements sent per token and rank, forward (backward the same; ring convention):
gather (P-1)/P·C; all_to_all (P-1)/P²·(C + width of all simulated heads sent back).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
    all_to_all,
)


class HeadExchange(ABC):
    """Moves projected columns to where heads are simulated, and simulated heads to where they attend."""

    # Whether `my_heads` brings what other ranks computed.
    sends_heads: ClassVar[bool] = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = group.size()
        self.rank = group.rank()

    @abstractmethod
    def all_columns(self, columns_TC_local: torch.Tensor) -> torch.Tensor:
        """[T, C/P] on each rank -> [T', C], the columns in rank order."""

    def base_heads_here(self, num_heads: int) -> slice:
        """Base heads whose simulated copies are computed between the exchanges: all, if not overridden."""
        return slice(0, num_heads)

    @abstractmethod
    def my_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        """Simulated heads, each [T', r·n, D] in block-major order -> [T, r·n_local, D] of this rank.

        Args:
            simulated: One tensor for each of query, key and value; head g·n + i is base head i of block g.
            num_blocks: r, the copies of the base heads, of each tensor.
            num_tokens: T, all tokens.
        """

    def own_base_heads(self, num_heads: int) -> slice:
        """Base heads this rank attends with: a P-th, or one that it shares where P exceeds them."""
        first = self.rank * num_heads // self.num_ranks
        return slice(first, first + max(1, num_heads // self.num_ranks))


class SingleRank(HeadExchange):
    """One rank owns all heads; nothing moves."""

    def all_columns(self, columns_TC_local: torch.Tensor) -> torch.Tensor:
        """The input."""
        return columns_TC_local

    def my_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        """The input."""
        return list(simulated)


class GatherExchange(HeadExchange):
    """All-gather over columns, whose backward is a reduce-scatter: the gathered gradients are partial."""

    def all_columns(self, columns_TC_local: torch.Tensor) -> torch.Tensor:
        """[T, C/P] -> [T, C]."""
        gathered: torch.Tensor = all_gather_last_dim_from_tensor_parallel_region(columns_TC_local, self.group)
        return gathered

    def base_heads_here(self, num_heads: int) -> slice:
        """This rank's own."""
        return self.own_base_heads(num_heads)

    def my_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        """The input: only this rank's heads were computed."""
        return list(simulated)


class AllToAllExchange(HeadExchange):
    """Trades tokens for columns, and simulated heads for tokens; one may have more than another, or none."""

    sends_heads = True

    def all_columns(self, columns_TC_local: torch.Tensor) -> torch.Tensor:
        """[T, C/P] -> [T/P, C]."""
        tokens_of = self._tokens_of_ranks(columns_TC_local.shape[0])
        mine = tokens_of[self.rank]
        received: torch.Tensor = all_to_all(self.group, columns_TC_local, [mine] * self.num_ranks, tokens_of)
        by_token: torch.Tensor = received.unflatten(0, (self.num_ranks, mine)).transpose(0, 1)
        return by_token.flatten(1)

    def my_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        """Each [T/P, r·n, D] -> [T, r·n_local, D], all in one exchange."""
        mine = simulated[0].shape[0]
        by_rank = [
            self._split_by_rank(heads, blocks) for heads, blocks in zip(simulated, num_blocks, strict=True)
        ]
        widths = [part.shape[-1] for part in by_rank]
        outgoing = torch.cat(by_rank, dim=-1).flatten(0, 1)
        tokens_of = self._tokens_of_ranks(num_tokens)
        received = all_to_all(self.group, outgoing, tokens_of, [mine] * self.num_ranks)
        return [
            part.unflatten(-1, (-1, heads.shape[-1]))
            for part, heads in zip(received.split(widths, dim=-1), simulated, strict=True)
        ]

    def _split_by_rank(self, heads_TMD: torch.Tensor, blocks: int) -> torch.Tensor:
        """[T/P, m, D] -> [P, T/P, m_local·D]; a head that several ranks attend with goes to each."""
        tokens, simulated, features = heads_TMD.shape
        base = simulated // blocks
        grouped = heads_TMD.view(tokens, blocks, base, features)
        if base < self.num_ranks:
            grouped = grouped.repeat_interleave(self.num_ranks // base, dim=2)
        by_rank: torch.Tensor = grouped.unflatten(2, (self.num_ranks, -1)).permute(2, 0, 1, 3, 4)
        return by_rank.flatten(2)

    def _tokens_of_ranks(self, tokens: int) -> list[int]:
        share, rest = divmod(tokens, self.num_ranks)
        return [share + (rank < rest) for rank in range(self.num_ranks)]


EXCHANGES: dict[str, type[HeadExchange]] = {"gather": GatherExchange, "all_to_all": AllToAllExchange}


def build_head_exchange(strategy: str, group: dist.ProcessGroup) -> HeadExchange:
    """The exchange for a strategy of `EXCHANGES` over the tensor group; none is needed for one rank."""
    return SingleRank(group) if group.size() == 1 else EXCHANGES[strategy](group)
