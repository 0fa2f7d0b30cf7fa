"""Runs of a tensor's elements as boxes, which is what torch's distributed format can place."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

# A tensor with its place: offsets in something larger.
Box = tuple[torch.Tensor, tuple[int, ...]]


def boxes_of_run(values: torch.Tensor, shape: tuple[int, ...], first_element: int) -> Iterator[Box]:
    """Cuts a run of elements of a tensor of `shape`, in memory's order, into boxes of it, in that order.

    At most one box for the part of a row at either end, in each dimension, and one for all between.
    """
    if tuple(values.shape) == shape:
        yield values, (0,) * len(shape)
        return
    if len(shape) == 1:
        yield values, (first_element,)
        return
    row = math.prod(shape[1:])
    done = 0
    while done < values.numel():
        index, within = divmod(first_element + done, row)
        rows = (values.numel() - done) // row
        if within == 0 and rows:
            block = values.narrow(0, done, rows * row).view(rows, *shape[1:])
            yield block, (index,) + (0,) * (len(shape) - 1)
            done += rows * row
            continue
        part = values.narrow(0, done, min(row - within, values.numel() - done))
        for box, offset in boxes_of_run(part, shape[1:], within):
            yield box.unsqueeze(0), (index, *offset)
        done += part.numel()
