"""Copies of tensors in host memory are exact and compact, whichever buffers they pass through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sas_megatron.checkpoint.host_copies import HostCopies

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (16,), (3, 5), (4, 4, 2)]


class DelayedCopies:
    """The copies of a device that fills a buffer only when it is waited for, as late as a bus may."""

    def __init__(self, buffers: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.buffers = buffers
        self.num_started = self.num_finished = 0

    def mark(self) -> Callable[[], None]:
        number = self.num_started
        self.num_started += 1
        content = self.buffers[number % 2].clone()
        self.buffers[number % 2].fill_(255)

        def wait() -> None:
            assert number == self.num_finished, "parts are emptied in order"
            self.num_finished += 1
            self.buffers[number % 2].copy_(content)

        return wait


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_copy_through_buffers_equals_the_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each buffer holds eight float32 numbers, fewer than most of the shapes."""
    tensor = torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype)
    buffers = (torch.empty(32, dtype=torch.uint8), torch.empty(32, dtype=torch.uint8))
    device = DelayedCopies(buffers)
    copied = HostCopies.copy_through(buffers, tensor, mark=device.mark)
    assert copied.dtype == dtype
    assert torch.equal(copied, tensor)
    assert copied.untyped_storage().size() == tensor.nbytes
    assert device.num_finished == device.num_started


def test_views_are_copied_and_compact_tensors_are_not() -> None:
    copies, buffer = HostCopies(), torch.arange(24.0)
    assert copies.compact(buffer).data_ptr() == buffer.data_ptr()
    for view in (buffer[3:9], buffer.view(4, 6)[:, 2:5], buffer.view(4, 6).T[1:]):
        compact = copies.compact(view)
        assert torch.equal(compact, view)
        assert compact.untyped_storage().size() == view.nbytes
    weight = torch.nn.Parameter(buffer.clone())
    copied = copies.copy(weight)
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(copied, buffer)


def test_the_buffers_are_allocated_only_for_a_gpu() -> None:
    copies = HostCopies()
    copies.copy(torch.ones(3))
    assert "_locked_buffers" not in vars(copies)
