"""What each rank has, on every rank."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_from_ranks(value: T) -> list[T]:
    """The values of all ranks of the world, in their order; every rank must call it."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
