"""Boxes of runs of elements put together again are the run, each element in its place."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sas_megatron.checkpoint.boxes import boxes_of_run


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), st.data())
@settings(max_examples=300, deadline=None)
def test_the_boxes_of_a_run_hold_its_elements_where_they_belong(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    size = math.prod(shape)
    first = data.draw(st.integers(0, size - 1), "first element")
    length = data.draw(st.integers(1, size - first), "length")
    whole = torch.arange(size).view(shape)
    put_together = torch.full(shape, -1)
    boxes = list(boxes_of_run(whole.flatten()[first : first + length], shape, first))
    for box, offset in boxes:
        place = tuple(slice(low, low + extent) for low, extent in zip(offset, box.shape, strict=True))
        assert (put_together[place] == -1).all(), "boxes overlap"
        put_together[place] = box
    expected = torch.full((size,), -1)
    expected[first : first + length] = torch.arange(first, first + length)
    assert torch.equal(put_together.flatten(), expected)
    assert len(boxes) <= 2 * len(shape) - 1


def test_boxes_are_views_that_loading_fills() -> None:
    run = torch.zeros(17)
    for index, (box, _) in enumerate(boxes_of_run(run, (3, 4, 5), 7)):
        box.fill_(index + 1.0)
    assert run.all()
