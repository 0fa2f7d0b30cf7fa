"""What Megatron-core's distributed optimizer makes of the weights of a piece of the model. No torch.

It lays them, the last registered first, into a buffer of buckets, and each data rank has an equal part
of every bucket: that takes room between weights and at the ends of buckets, which is sent with them
(megatron-core 0.16.1, `distributed/param_and_grad_buffer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sas_megatron.config.tensor_group import Weight

WEIGHT_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
# `distributed/distributed_data_parallel.py`
BUCKET_ELEMENTS = 40_000_000
BUCKET_ELEMENTS_OF_RANK = 1_000_000


def count_buffer_elements(
    weights: Sequence[Weight],
    *,
    tensor: int,
    data_ranks: int,
    bucket_elements: int | None = None,
    own_buckets: Sequence[str] = (),
) -> int:
    """Elements of the buffer on one rank, the room included.

    Args:
        weights: Of one piece, in the order in which they are registered.
        tensor: Ranks that share them.
        data_ranks: Ranks that share a bucket, context ranks included.
        bucket_elements: A bucket with so many or more ends; None: one bucket.
        own_buckets: Terms of tables that have a bucket to themselves.
    """
    whole_bucket = math.lcm(data_ranks, BUCKET_ALIGNMENT)
    limit = math.inf if bucket_elements is None else bucket_elements
    end = bucket_start = 0
    for weight in reversed(weights):
        alone = weight.term in own_buckets
        end = _up_to_multiple(end, WEIGHT_ALIGNMENT)
        if alone:
            end = bucket_start = _up_to_multiple(end, whole_bucket)
        end += weight.elements_of_rank(tensor)
        if alone or end - bucket_start >= limit:
            end = bucket_start = _up_to_multiple(end, whole_bucket)
    return _up_to_multiple(end, whole_bucket)


def overlapped_bucket_elements(data_parallel: int) -> int:
    """Where a bucket ends whose reduction overlaps the backward pass, on so many data ranks."""
    return max(BUCKET_ELEMENTS, data_parallel * BUCKET_ELEMENTS_OF_RANK)


def _up_to_multiple(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
