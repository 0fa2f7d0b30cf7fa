"""The blocks of a range of elements contain each element of the range once, at its position in the tensor."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sas_megatron.checkpoint.sharded_tensors import split_run_into_blocks


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), st.data())
@settings(max_examples=300, deadline=None)
def test_blocks_cover_a_run_without_overlap(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = math.prod(shape)
    first = data.draw(st.integers(0, size - 1), "first element")
    length = data.draw(st.integers(1, size - first), "length")
    full = torch.arange(size).view(shape)
    assembled = torch.full(shape, -1)
    blocks = list(split_run_into_blocks(full.flatten()[first : first + length], shape, first))
    for block, offset in blocks:
        region = tuple(slice(low, low + extent) for low, extent in zip(offset, block.shape, strict=True))
        assert (assembled[region] == -1).all(), "blocks overlap"
        assembled[region] = block
    expected = torch.full((size,), -1)
    expected[first : first + length] = torch.arange(first, first + length)
    assert torch.equal(assembled.flatten(), expected)
    assert len(blocks) <= 2 * len(shape) - 1


def test_blocks_are_views_of_the_run() -> None:
    run = torch.zeros(17)
    for index, (block, _) in enumerate(split_run_into_blocks(run, (3, 4, 5), 7)):
        block.fill_(index + 1.0)
    assert run.all()
