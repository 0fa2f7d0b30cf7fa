"""Count the bytes of all live tensors, with and without storage.

The count does not use torch's allocator, so it is the same on every device and free of the allocator's
rounding. It does not see the memory that a kernel allocates for itself while it runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryMeter(TorchDispatchMode):
    """Track the storages that operations return, from their first use until they are freed.

    `live_bytes` is the size of all live storages, `peak_bytes` its maximum since the start or since
    `reset_peak`. A storage that existed before is counted from the first operation that returns a view of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}

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
                    self._track(value.untyped_storage())
        return result

    def reset_peak(self) -> None:
        """Reset the peak to the bytes that are held now."""
        self.peak_bytes = self.live_bytes

    def _track(self, storage: torch.UntypedStorage) -> None:
        identity = id(storage)
        if identity in self._live:
            return
        num_bytes = storage.nbytes()

        def forget(_reference: object) -> None:
            self.live_bytes -= self._live.pop(identity)[1]

        # The Python object of a storage lives as long as the storage, so a weak reference follows both.
        self._live[identity] = (weakref.ref(storage, forget), num_bytes)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def distinct_bytes(tensors: Iterable[torch.Tensor], *, without: Iterable[torch.Tensor] = ()) -> int:
    """Return the bytes of the distinct storages of `tensors`, except the storages of `without`."""
    known = {id(storage) for storage in (tensor.untyped_storage() for tensor in without)}
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for identity, storage in storages.items() if identity not in known)
