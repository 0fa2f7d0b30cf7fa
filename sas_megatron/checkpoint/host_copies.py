"""Copies of tensors in host memory, from a GPU through page-locked buffers.

    tensor on the GPU ── bus ──> two page-locked buffers in turn ── memory ──> tensor on the host

The bus copies one part into a buffer while the processor empties the other. A copy straight into ordinary
memory passes through a buffer of the driver, in one of these steps at a time. Locking the pages of the copy
itself would cost up to twice its size: torch rounds such allocations to powers of two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_BUFFER_BYTES = 2**26


class HostCopies:
    """Copies tensors to host memory; the buffers are allocated with the first tensor of a GPU."""

    def __init__(self, *, buffer_bytes: int = _BUFFER_BYTES) -> None:
        """Create it.

        Args:
            buffer_bytes: Bytes of each of the two buffers; a multiple of 16.
        """
        self._buffer_bytes = buffer_bytes

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy in host memory, whose storage has the size of the tensor."""
        if tensor.device.type == "cuda":
            return self.copy_through(self._locked_buffers, tensor, mark=_mark_on_stream)
        return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    def compact(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself if it is in host memory and its storage has its size; otherwise a copy."""
        tensor = tensor.detach()
        if tensor.device.type == "cpu" and tensor.untyped_storage().size() == tensor.nbytes:
            return tensor
        return self.copy(tensor)

    @functools.cached_property
    def _locked_buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = (
            torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)
        )
        return first, second

    @staticmethod
    def copy_through(
        buffers: tuple[torch.Tensor, torch.Tensor],
        tensor: torch.Tensor,
        *,
        mark: Callable[[], Callable[[], None]],
    ) -> torch.Tensor:
        """Return a copy that passes through two buffers of bytes in turn.

        Args:
            buffers: The buffers, of equal size.
            tensor: The source.
            mark: Called after a copy into a buffer was started; returns a function that waits for its end.
        """
        step = buffers[0].nbytes // tensor.element_size()
        copied = torch.empty(tensor.shape, dtype=tensor.dtype)
        parts = zip(
            tensor.detach().contiguous().view(-1).split(step), copied.view(-1).split(step), strict=True
        )
        started: list[tuple[Callable[[], None], torch.Tensor, torch.Tensor]] = []
        for number, (source, target) in enumerate(parts):
            staged = buffers[number % 2].view(tensor.dtype)[: source.numel()]
            staged.copy_(source, non_blocking=True)
            started.append((mark(), staged, target))
            if number > 0:
                _empty(*started.pop(0))
        _empty(*started.pop())
        return copied


def _empty(wait: Callable[[], None], staged: torch.Tensor, target: torch.Tensor) -> None:
    wait()
    target.copy_(staged)


def _mark_on_stream() -> Callable[[], None]:
    event = torch.cuda.Event()
    event.record()
    return event.synchronize
