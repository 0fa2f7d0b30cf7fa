"""The exchange of heads between tensor ranks for the SAS head simulation, which reads every head.

    projected [T, W/P]                    all tokens, local columns (the output of the column-parallel QKV)
      -> `gather_columns` [T', W]         T' tokens, columns of all ranks
      -> simulate heads                   replicated weights, no communication
      -> `scatter_heads` [T, m/P, D]      all tokens, local simulated heads (one tensor each for q, k and v)

W counts projected columns and m simulated heads. There are two strategies. **gather** keeps all tokens: every
rank repeats the first convolution for all heads, and computes only its local heads in the second (T' = T).
**all_to_all** keeps 1/P of the tokens (T' = T/P) and all heads, and sends the simulated heads back, so that
each rank computes 1/P of the work. This is possible because the simulation works on each token separately.

Elements sent per token and rank in forward (the same in backward; ring convention):
gather (P-1)/P·W; all_to_all (P-1)/P²·(W + the width of all simulated heads sent back).
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
from typing_extensions import override


class HeadExchange(ABC):
    """An exchange of projected columns before the head simulation, and of simulated heads after it."""

    # Whether `scatter_heads` communicates.
    sends_heads: ClassVar[bool] = False

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.num_ranks = group.size()
        self.rank = group.rank()

    @abstractmethod
    def gather_columns(self, columns_TW_local: torch.Tensor) -> torch.Tensor:
        """Return the columns of all ranks in rank order, [T, W/P] -> [T', W]."""

    def base_heads_to_simulate(self, num_heads: int) -> slice:
        """Return the base heads whose simulated copies this rank computes: all of `num_heads` by default."""
        return slice(0, num_heads)

    @abstractmethod
    def scatter_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        """Return the local simulated heads of all tokens, [T', r·n, D] -> [T, r·n_local, D] for each tensor.

        Args:
            simulated: One tensor each for query, key and value, in block-major order: head g·n + i is base
                head i of block g.
            num_blocks: r of each tensor, the number of simulated copies of the base heads.
            num_tokens: T, the number of all tokens.
        """

    def local_base_heads(self, num_heads: int) -> slice:
        """Return the base heads that this rank attends with: n/P, or one shared head if P exceeds n."""
        first = self.rank * num_heads // self.num_ranks
        return slice(first, first + max(1, num_heads // self.num_ranks))


class SingleRank(HeadExchange):
    """The exchange of a single rank, which has all heads: identity in forward and backward."""

    @override
    def gather_columns(self, columns_TW_local: torch.Tensor) -> torch.Tensor:
        return columns_TW_local

    @override
    def scatter_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        return list(simulated)


class GatherExchange(HeadExchange):
    """An all-gather of columns; each rank then computes only its local simulated heads."""

    @override
    def gather_columns(self, columns_TW_local: torch.Tensor) -> torch.Tensor:
        """Return the columns of all ranks, [T, W/P] -> [T, W].

        All-gather in forward, reduce-scatter in backward, because the gradient of the gathered columns is a
        partial sum on each rank.
        """
        gathered: torch.Tensor = all_gather_last_dim_from_tensor_parallel_region(columns_TW_local, self.group)
        return gathered

    @override
    def base_heads_to_simulate(self, num_heads: int) -> slice:
        return self.local_base_heads(num_heads)

    @override
    def scatter_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        """Return the argument: it holds only local heads."""
        return list(simulated)


class AllToAllExchange(HeadExchange):
    """An all-to-all of tokens for columns, and one of simulated heads for tokens.

    Ranks may hold different numbers of tokens, including none, if P does not divide T.
    """

    sends_heads = True

    @override
    def gather_columns(self, columns_TW_local: torch.Tensor) -> torch.Tensor:
        """Return all columns of the local tokens, [T, W/P] -> [T/P, W].

        All-to-all in forward and backward.
        """
        tokens_per_rank = self._tokens_per_rank(columns_TW_local.shape[0])
        num_local = tokens_per_rank[self.rank]
        received: torch.Tensor = all_to_all(
            self.group, columns_TW_local, [num_local] * self.num_ranks, tokens_per_rank
        )
        by_token: torch.Tensor = received.unflatten(0, (self.num_ranks, num_local)).transpose(0, 1)
        return by_token.flatten(1)

    @override
    def scatter_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        """Return the local heads of all tokens, [T/P, r·n, D] -> [T, r·n_local, D] for each tensor.

        One all-to-all for all tensors in forward, and one in backward.
        """
        num_local = simulated[0].shape[0]
        by_rank = [
            self._split_by_rank(heads, blocks) for heads, blocks in zip(simulated, num_blocks, strict=True)
        ]
        widths = [split.shape[-1] for split in by_rank]
        outgoing = torch.cat(by_rank, dim=-1).flatten(0, 1)
        tokens_per_rank = self._tokens_per_rank(num_tokens)
        received = all_to_all(self.group, outgoing, tokens_per_rank, [num_local] * self.num_ranks)
        return [
            columns.unflatten(-1, (-1, heads.shape[-1]))
            for columns, heads in zip(received.split(widths, dim=-1), simulated, strict=True)
        ]

    def _split_by_rank(self, heads_TMD: torch.Tensor, blocks: int) -> torch.Tensor:
        """Split [T/P, m, D] into [P, T/P, m_local·D]; a head that several ranks share goes to each."""
        tokens, simulated, features = heads_TMD.shape
        base = simulated // blocks
        grouped = heads_TMD.view(tokens, blocks, base, features)
        if base < self.num_ranks:
            grouped = grouped.repeat_interleave(self.num_ranks // base, dim=2)
        by_rank: torch.Tensor = grouped.unflatten(2, (self.num_ranks, -1)).permute(2, 0, 1, 3, 4)
        return by_rank.flatten(2)

    def _tokens_per_rank(self, num_tokens: int) -> list[int]:
        share, remainder = divmod(num_tokens, self.num_ranks)
        return [share + (rank < remainder) for rank in range(self.num_ranks)]


EXCHANGES: dict[str, type[HeadExchange]] = {"gather": GatherExchange, "all_to_all": AllToAllExchange}


def build_head_exchange(strategy: str, group: dist.ProcessGroup) -> HeadExchange:
    """Return the exchange of a strategy in `EXCHANGES`, or `SingleRank` for a group of one rank."""
    return SingleRank(group) if group.size() == 1 else EXCHANGES[strategy](group)
