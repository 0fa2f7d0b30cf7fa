"""Size of the buffers in which Megatron-core's distributed optimizer lays out weights. No torch.

The weights of a model chunk, the last registered one first, are divided into buckets, and each data rank owns
an equal shard of every bucket. Alignment adds padding between weights and at the ends of buckets, which is
sent with them (megatron-core 0.16.1, `distributed/param_and_grad_buffer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sas_megatron.costs.tensor_traffic import Weight

WEIGHT_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
# From megatron-core's `distributed/distributed_data_parallel.py`.
BUCKET_ELEMENTS = 40_000_000
BUCKET_ELEMENTS_PER_RANK = 1_000_000


def count_buffer_elements(
    weights: Sequence[Weight],
    *,
    tensor: int,
    data_ranks: int,
    bucket_elements: int | None = None,
    separate_terms: Sequence[str] = (),
) -> int:
    """Return the elements of one rank's buffer, padding included.

    Args:
        weights: The weights of one model chunk, in the order in which they are registered.
        tensor: Number of tensor ranks.
        data_ranks: Number of ranks that share a bucket, context ranks included.
        bucket_elements: A bucket ends when it has this many elements; None for a single bucket.
        separate_terms: Cost terms of tables that have a bucket of their own.
    """
    alignment = math.lcm(data_ranks, BUCKET_ALIGNMENT)
    limit = math.inf if bucket_elements is None else bucket_elements
    end = bucket_start = 0
    for weight in reversed(weights):
        is_separate = weight.term in separate_terms
        end = _round_up(end, WEIGHT_ALIGNMENT)
        if is_separate:
            end = bucket_start = _round_up(end, alignment)
        end += weight.count_local_elements(tensor)
        if is_separate or end - bucket_start >= limit:
            end = bucket_start = _round_up(end, alignment)
    return _round_up(end, alignment)


def overlapped_bucket_elements(data_parallel: int) -> int:
    """Return the size at which a bucket ends if its reduction overlaps the backward pass."""
    return max(BUCKET_ELEMENTS, data_parallel * BUCKET_ELEMENTS_PER_RANK)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
