"""How tensor ranks and context ranks share the heads of a layer. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from sas_megatron.config.attention import AttentionConfig


@dataclass(frozen=True)
class HeadSharding:
    """How `ContextExchange` shards the heads of a tensor rank over C context ranks.

    Each context rank gets 1/C of the heads of each of `num_blocks` blocks, or of all heads in their order
    (`num_blocks` = 1). With `copies_keys`, there are too few key heads to shard, and each query head is sent
    with a copy of its key and value head.
    """

    num_blocks: int
    copies_keys: bool

    @staticmethod
    def select(num_query_heads: int, num_key_heads: int, *, num_blocks: int, ranks: int) -> HeadSharding:
        """Select the sharding of one tensor rank's heads over `ranks` context ranks.

        Blocks are sharded one by one if each block has enough query heads, and if that needs no copies of
        key heads that sharding all heads in their order would avoid.
        """
        queries_fit = (num_query_heads // num_blocks) % ranks == 0
        keys_fit = (num_key_heads // num_blocks) % ranks == 0
        sharded_blocks = num_blocks if queries_fit and (keys_fit or num_key_heads % ranks) else 1
        return HeadSharding(sharded_blocks, copies_keys=(num_key_heads // sharded_blocks) % ranks != 0)


def count_local_heads(attention: AttentionConfig, *, tensor: int) -> tuple[int, int]:
    """Return the numbers of query heads and key heads of one of `tensor` ranks, after the simulation of SAS.

    If a block has fewer key heads than there are ranks, several ranks have the same key head.
    """
    keys = attention.num_blocks * max(1, attention.num_key_value_heads // tensor)
    return attention.num_attended_heads // tensor, keys


def count_attended_heads(attention: AttentionConfig, *, tensor: int, context: int) -> tuple[int, int]:
    """Return the numbers of query heads and key heads of one rank in core attention, over all tokens."""
    queries, keys, _ = _exchanged_heads(attention, tensor=tensor, context=context)
    return queries // context, keys // context


def count_context_elements(attention: AttentionConfig, *, tensor: int, context: int) -> Fraction:
    """Return the elements that a rank sends over the context group per local token in the forward pass.

    The backward pass sends the same number. Counted are (C-1)/C of queries, keys, values and the result. If
    a rank has all blocks of its heads, the result is averaged over the r blocks before it is sent back. See
    `distributed.context_exchange`.
    """
    queries, keys, sharding = _exchanged_heads(attention, tensor=tensor, context=context)
    width = (queries + keys) * attention.query_key_dim + keys * attention.value_width
    width += queries // sharding.num_blocks * attention.value_width
    return Fraction((context - 1) * width, context)


def _exchanged_heads(
    attention: AttentionConfig, *, tensor: int, context: int
) -> tuple[int, int, HeadSharding]:
    """Return the query and key heads that context ranks exchange, copies included, and their sharding."""
    queries, keys = count_local_heads(attention, tensor=tensor)
    sharding = HeadSharding.select(queries, keys, num_blocks=attention.num_blocks, ranks=context)
    return queries, queries if sharding.copies_keys else keys, sharding
