"""Exchange of heads between tensor ranks for the SAS head simulation, and the choice of the strategy.

Every simulated head reads all base heads, while each rank projects only its local ones:

    projected [T, W/P]                    all tokens, local columns (the output of the column-parallel QKV)
      -> `gather_columns` [T', W]         T' tokens, columns of all ranks
      -> simulate heads                   replicated weights, no communication
      -> `scatter_heads` [T, m/P, D]      all tokens, local simulated heads (one tensor each for q, k and v)

W counts projected columns and m simulated heads. There are two strategies. **gather** keeps all tokens: every
rank repeats the first convolution for all heads, and computes only its local heads in the second (T' = T).
**all_to_all** keeps 1/P of the tokens (T' = T/P) and all heads, and sends the simulated heads back, so that
each rank computes 1/P of the work. This is possible because the simulation works on each token separately.
`attention.exchange=auto` takes the strategy with less estimated time.

Elements sent per token and rank in forward (the same in backward; ring convention):
gather (P-1)/P·W; all_to_all (P-1)/P²·(W + the width of all simulated heads sent back).

The module imports torch only inside functions, since the costs import the choice without torch.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.costs.tensor_traffic import TensorGroup, Traffic

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

logger = logging.getLogger(__name__)

# One H100 in bfloat16, from its data sheet: 989 TFLOP/s dense, of which small products are assumed to reach a
# third; 450 GB/s of NVLink in each direction, assumed 70 %; 3.35 TB/s of memory bandwidth, assumed 80 %.
# Only the ratios affect the choice.
MATRIX_FLOPS_PER_SECOND = 330e12
LINK_BYTES_PER_SECOND = 315e9
MEMORY_BYTES_PER_SECOND = 2.7e12
ELEMENT_BYTES = 2


@dataclass(frozen=True)
class ExchangeCost:
    """Forward cost of a strategy for one token on one rank, in addition to 1/P of the simulation.

    Attributes:
        sent_elements: Elements that the rank sends.
        repeated_flops: FLOPs of the first convolution that other ranks compute as well.
        repeated_elements: Elements that the rank writes and reads for heads that other ranks own.
    """

    sent_elements: float
    repeated_flops: float
    repeated_elements: float

    @property
    def seconds(self) -> float:
        """The estimated time to send, to compute, and to write and read."""
        return (
            self.sent_elements * ELEMENT_BYTES / LINK_BYTES_PER_SECOND
            + self.repeated_flops / MATRIX_FLOPS_PER_SECOND
            + 2 * self.repeated_elements * ELEMENT_BYTES / MEMORY_BYTES_PER_SECOND
        )


def exchange_traffic(attention: SimulatedAttentionConfig, strategy: str, group: TensorGroup) -> Traffic:
    """Return the bytes that a strategy sends for T tokens on P ranks, with W = D(N + 2G) projected columns.

    gather sends (P-1)/P·T·W elements, all_to_all (P-1)/P²·T·(W + W'), where W' is the width of the heads that
    are sent back: r·N·D + 2·r·G·D if all heads are simulated, without the factor r for other heads. If
    G < P, P takes the place of G, since each rank gets a copy of the key/value head that it shares.
    """
    if strategy == "gather":
        return group.all_gather(attention.qkv_width)
    simulated = attention.head_simulations()
    groups = attention.num_key_value_heads
    returned_heads = sum(
        max(heads, group.ranks) * (attention.head_expansion if name in simulated else 1)
        for name, heads in (("query", attention.num_heads), ("key", groups), ("value", groups))
    )
    return group.all_to_all(attention.qkv_width, return_width=returned_heads * attention.head_dim)


def exchange_costs(attention: SimulatedAttentionConfig, *, tensor_parallel: int) -> dict[str, ExchangeCost]:
    """Return the cost of each strategy on `tensor_parallel` ranks."""
    ranks, width = tensor_parallel, attention.head_dim
    simulations = attention.head_simulations()
    expanded = sum(attention.head_expansion * heads for heads in simulations.values()) * width
    first_convolution = sum(
        2 * attention.kernel_size * attention.head_expansion * heads * heads * width
        for heads in simulations.values()
    )
    remote = (ranks - 1) / ranks
    # As many tokens as ranks, so that each rank has the same number of tokens.
    group = TensorGroup(ranks=ranks, tokens=ranks, sequence=False, element_bytes=1)
    sent = {
        name: float(exchange_traffic(attention, name, group).forward / ranks)
        for name in ("gather", "all_to_all")
    }
    return {
        "gather": ExchangeCost(
            sent_elements=sent["gather"],
            repeated_flops=remote * first_convolution,
            repeated_elements=remote * (attention.qkv_width + expanded),
        ),
        "all_to_all": ExchangeCost(
            sent_elements=sent["all_to_all"], repeated_flops=0.0, repeated_elements=0.0
        ),
    }


def resolve_exchange(attention: SimulatedAttentionConfig, *, tensor_parallel: int) -> str:
    """Return the configured strategy, or the cheaper one for `auto`."""
    if attention.exchange != "auto":
        return attention.exchange
    return _select_cheaper(exchange_costs(attention, tensor_parallel=tensor_parallel))


def choose_exchange(attention: SimulatedAttentionConfig, *, tensor_parallel: int) -> str:
    """Return `resolve_exchange`, and log the estimated times if `auto` chose between them."""
    if attention.exchange != "auto":
        return attention.exchange
    costs = exchange_costs(attention, tensor_parallel=tensor_parallel)
    choice = _select_cheaper(costs)
    if tensor_parallel > 1:
        logger.info(
            "attention.exchange=auto: %s (estimated ns per token and layer: %s)",
            choice,
            ", ".join(f"{name} {cost.seconds * 1e9:.2f}" for name, cost in costs.items()),
        )
    return choice


def _select_cheaper(costs: dict[str, ExchangeCost]) -> str:
    return min(costs, key=lambda name: costs[name].seconds)


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

    def own_tokens(self, num_tokens: int) -> slice:
        """Return the tokens T' of which this rank has all columns: all of `num_tokens` by default."""
        return slice(0, num_tokens)

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
        from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region

        gathered: torch.Tensor = all_gather_last_dim_from_tensor_parallel_region(columns_TW_local, self.group)
        return gathered

    @override
    def base_heads_to_simulate(self, num_heads: int) -> slice:
        return self.local_base_heads(num_heads)

    @override
    def scatter_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        """Return `simulated` unchanged, since the rank has computed only its local heads."""
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
        from megatron.core.tensor_parallel.mappings import all_to_all

        tokens_per_rank = self._tokens_per_rank(columns_TW_local.shape[0])
        num_local = tokens_per_rank[self.rank]
        received: torch.Tensor = all_to_all(
            self.group, columns_TW_local, [num_local] * self.num_ranks, tokens_per_rank
        )
        by_token: torch.Tensor = received.unflatten(0, (self.num_ranks, num_local)).transpose(0, 1)
        return by_token.flatten(1)

    @override
    def own_tokens(self, num_tokens: int) -> slice:
        """Return the local tokens, a contiguous 1/P of all."""
        tokens_per_rank = self._tokens_per_rank(num_tokens)
        first = sum(tokens_per_rank[: self.rank])
        return slice(first, first + tokens_per_rank[self.rank])

    @override
    def scatter_heads(
        self, simulated: Sequence[torch.Tensor], *, num_blocks: Sequence[int], num_tokens: int
    ) -> list[torch.Tensor]:
        """Return the local heads of all tokens, [T/P, r·n, D] -> [T, r·n_local, D] for each tensor.

        One all-to-all for all tensors in forward, and one in backward.
        """
        import torch
        from megatron.core.tensor_parallel.mappings import all_to_all

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
