"""Counts the bytes that tensors hold, as they come and go: on real tensors and on those without storage.

torch's allocator is not asked, so the figure is the same on every device and free of its rounding;
what a kernel borrows for itself while it runs is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryMeter(TorchDispatchMode):
    """While entered, follows the storages that operations return until they are freed.

    `held_bytes` is what is alive now, `peak_bytes` the most since the start or `reset_peak`.
    Storages that were there before and only turn up again as views are counted when they do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim":
            for value in tree_iter(result):
                if isinstance(value, torch.Tensor):
                    self._follow(value.untyped_storage())
        return result

    def reset_peak(self) -> None:
        """Begins the search for the peak anew, from what is held now."""
        self.peak_bytes = self.held_bytes

    def _follow(self, storage: torch.UntypedStorage) -> None:
        identity = id(storage)
        if identity in self._alive:
            return
        num_bytes = storage.nbytes()

        def forget(_reference: object) -> None:
            self.held_bytes -= self._alive.pop(identity)[1]

        # The wrapper lives as long as the storage beneath it, whoever holds that.
        self._alive[identity] = (weakref.ref(storage, forget), num_bytes)
        self.held_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)


def distinct_bytes(tensors: Iterable[torch.Tensor], *, without: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the storages that `tensors` view, each once, less those that `without` views."""
    known = {id(storage) for storage in (tensor.untyped_storage() for tensor in without)}
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for identity, storage in storages.items() if identity not in known)
