"""How tensor ranks and context ranks share the heads of a layer. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from sas_megatron.config.attention import AttentionConfig


class AttendedHeads(NamedTuple):
    """The heads of one tensor rank in core attention: their numbers, and the features of each."""

    num_queries: int
    num_keys: int
    query_key_dim: int
    value_width: int


@dataclass(frozen=True)
class HeadSharding:
    """How `ContextExchange` shards the heads of a tensor rank over C context ranks.

    Each context rank gets 1/C of the heads of each of `num_blocks` blocks, or of all heads in their order
    (`num_blocks` = 1). If C does not divide the key heads of a block, each key and value head is sent in
    `key_copies` equal copies: the fewest with which every rank gets equally many, each for equally many query
    heads. A block of g key heads is sent as lcm(g, C).
    """

    num_blocks: int
    key_copies: int

    @staticmethod
    def select(heads: AttendedHeads, *, num_blocks: int, ranks: int) -> HeadSharding:
        """Select the sharding of one tensor rank's heads over `ranks` context ranks that sends the least.

        The choice is between 1/C of each block, whose result is averaged over the blocks before it is sent,
        and 1/C of all heads in their order, which may need fewer copies of key heads.
        """
        choices = [
            HeadSharding(blocks, ranks // math.gcd(heads.num_keys // blocks, ranks))
            for blocks in (num_blocks, 1)
            if (heads.num_queries // blocks) % ranks == 0
        ]
        return min(choices, key=lambda sharding: sharding.count_elements(heads))

    def count_elements(self, heads: AttendedHeads) -> int:
        """Return the elements of queries, keys, values and the result, per token of one tensor rank."""
        keys = heads.num_keys * self.key_copies
        width = (heads.num_queries + keys) * heads.query_key_dim + keys * heads.value_width
        return width + heads.num_queries // self.num_blocks * heads.value_width


def count_local_heads(attention: AttentionConfig, *, tensor: int) -> tuple[int, int]:
    """Return the numbers of query heads and key heads of one of `tensor` ranks, after the simulation of SAS.

    If a block has fewer key heads than there are ranks, several ranks have the same key head.
    """
    keys = attention.num_blocks * max(1, attention.num_key_value_heads // tensor)
    return attention.num_attended_heads // tensor, keys


def count_attended_heads(attention: AttentionConfig, *, tensor: int, context: int) -> tuple[int, int]:
    """Return the numbers of query heads and key heads of one rank in core attention, over all tokens."""
    heads, sharding = shard_heads(attention, tensor=tensor, context=context)
    return heads.num_queries // context, heads.num_keys * sharding.key_copies // context


def count_context_elements(attention: AttentionConfig, *, tensor: int, context: int) -> Fraction:
    """Return the elements that a rank sends over the context group per local token in the forward pass.

    The backward pass sends the same number. Counted are (C-1)/C of queries, keys, values and the result. If
    a rank has all blocks of its heads, the result is averaged over the r blocks before it is sent back. See
    `distributed.context_exchange`.
    """
    heads, sharding = shard_heads(attention, tensor=tensor, context=context)
    return Fraction((context - 1) * sharding.count_elements(heads), context)


def shard_heads(
    attention: AttentionConfig, *, tensor: int, context: int
) -> tuple[AttendedHeads, HeadSharding]:
    """Return the heads of one of `tensor` ranks in core attention, and how `context` ranks share them."""
    queries, keys = count_local_heads(attention, tensor=tensor)
    heads = AttendedHeads(queries, keys, attention.query_key_dim, attention.value_width)
    return heads, HeadSharding.select(heads, num_blocks=attention.num_blocks, ranks=context)
