"""Reads batches in a thread, ahead of the training step that uses them.

    thread         token files -> collated batch -> pinned memory -> queue
    main thread    queue -> asynchronous copy to the device

Reading ahead changes no state: the order of the samples is fixed, and a run counts the samples that it has
consumed, not those that were read.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Batch = dict[str, torch.Tensor]

# Enough for the first microbatches of a step to be ready while the last ones of the previous step are used,
# and for reads that take longer now and then.
MICROBATCHES_AHEAD = 4


class _End:
    """The end of the items, with the error that ended them, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class ReadAhead(Generic[T]):
    """Iterates over items that a thread takes from another iterator ahead of time.

    The thread waits once `depth` items are ready. An error in it is raised by `next`, after the items before
    it. The thread ends when this object is closed or no longer referenced.

    Args:
        items: The iterator, which only the thread uses.
        depth: Largest number of items that are ready.
    """

    def __init__(self, items: Iterator[T], *, depth: int = MICROBATCHES_AHEAD) -> None:
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        stopped = threading.Event()
        # The thread must not refer to this object, which would then never be released.
        self.close = weakref.finalize(self, _stop, stopped, self._queue)
        threading.Thread(
            target=_fill, args=(items, self._queue, stopped), name="read ahead", daemon=True
        ).start()

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        item = self._queue.get()
        if not isinstance(item, _End):
            return item
        self._queue.put(item)  # for further calls
        if item.error is not None:
            raise item.error
        raise StopIteration


def _fill(items: Iterator[T], filled: queue.Queue[T | _End], stopped: threading.Event) -> None:
    try:
        for item in items:
            filled.put(item)
            if stopped.is_set():
                return
        filled.put(_End())
    except BaseException as error:
        filled.put(_End(error))


def _stop(stopped: threading.Event, filled: queue.Queue[T | _End]) -> None:
    """Let the thread end: it may wait for a free place in the queue."""
    stopped.set()
    while not filled.empty():
        filled.get_nowait()


def pinned(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches, for a CUDA device in pinned memory, from which copies to it are asynchronous."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of the calling thread
    for batch in batches:
        yield {name: value.pin_memory() for name, value in batch.items()} if device.type == "cuda" else batch


def on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on the device; the copies of pinned tensors do not wait."""
    for batch in batches:
        yield {name: value.to(device, non_blocking=True) for name, value in batch.items()}
