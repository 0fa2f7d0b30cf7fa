"""Which heads a rank has: its tensor rank's, and how the ranks of a context group share those. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from sas_megatron.config.attention import AttentionConfig


@dataclass(frozen=True)
class SharedHeads:
    """What `ContextExchange` is to do with a tensor rank's heads.

    Each of C ranks gets a C-th of each of `num_blocks` blocks: all, or one, the heads as they come. Where
    there are too few keys to share, each query head brings its own copy.
    """

    num_blocks: int
    copies_keys: bool

    @staticmethod
    def of(num_query_heads: int, num_key_heads: int, *, num_blocks: int, ranks: int) -> SharedHeads:
        """For heads of so many simulated blocks on each tensor rank, and `ranks` context ranks.

        Heads are shared as they come where a block has fewer query heads than there are ranks, and where
        keys could only be shared in parts of a block by sending copies of them.
        """
        queries_fit = (num_query_heads // num_blocks) % ranks == 0
        keys_fit = (num_key_heads // num_blocks) % ranks == 0
        shared = num_blocks if queries_fit and (keys_fit or num_key_heads % ranks) else 1
        return SharedHeads(shared, copies_keys=(num_key_heads // shared) % ranks != 0)


def heads_of_tensor_rank(attention: AttentionConfig, *, tensor: int) -> tuple[int, int]:
    """Query heads and key heads of one of `tensor` ranks at the scores, simulated ones where there are such.

    Where a block has fewer key heads than there are ranks, several ranks have the same one.
    """
    keys = attention.num_blocks * max(1, attention.num_key_value_heads // tensor)
    return attention.num_attended_heads // tensor, keys


def _traded_heads(attention: AttentionConfig, *, tensor: int, context: int) -> tuple[int, int, SharedHeads]:
    """Query heads and key heads that a tensor rank's context ranks share, copies included, and how."""
    queries, keys = heads_of_tensor_rank(attention, tensor=tensor)
    shared = SharedHeads.of(queries, keys, num_blocks=attention.num_blocks, ranks=context)
    return queries, queries if shared.copies_keys else keys, shared


def attended_heads(attention: AttentionConfig, *, tensor: int, context: int) -> tuple[int, int]:
    """Query heads and key heads that one rank attends with, over all tokens of a sequence."""
    queries, keys, _ = _traded_heads(attention, tensor=tensor, context=context)
    return queries // context, keys // context


def count_context_elements(attention: AttentionConfig, *, tensor: int, context: int) -> Fraction:
    """Elements that a rank sends over the context group for each of its tokens, forward; backward the same.

    (C-1)/C of query, key and value and of the result, whose mean over the r blocks is taken before it is
    traded back wherever a rank has all blocks of its heads. See `parallel.context_exchange`.
    """
    queries, keys, shared = _traded_heads(attention, tensor=tensor, context=context)
    traded = (queries + keys) * attention.query_key_dim + keys * attention.value_width
    traded += queries // shared.num_blocks * attention.value_width
    return Fraction((context - 1) * traded, context)
