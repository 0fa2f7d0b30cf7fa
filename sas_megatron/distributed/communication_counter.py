"""Count the bytes that this rank sends in collectives, by group and operation.

Every collective passes torch's dispatcher as a `c10d` operation, where a dispatch mode sees it. Bytes follow
the ring convention. For a tensor of b bytes in a group of n, a rank sends:

    all_reduce                     2·(n-1)/n·b
    all_gather, reduce_scatter     (n-1)/n of the unsharded tensor
    all_to_all                     the (n-1)/n of its input that go to other ranks
    broadcast                      (n-1)/n·b
    point-to-point                 b

A network interface counts protocol headers in addition, and gloo sends twice as much for a reduce_scatter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class CommunicationCounter(TorchDispatchMode):
    """A context manager that counts the bytes sent in every collective of this process.

    Args:
        names: Name in reports -> process group. Other groups are counted as "other".
        point_to_point: Name for messages between two ranks of a group that is not in `names`.

    Attributes:
        bytes_sent: Group name -> operation -> bytes.
        calls: Group name -> operation -> number of collectives.
    """

    def __init__(self, names: dict[str, dist.ProcessGroup], *, point_to_point: str = "other") -> None:
        super().__init__()
        self.names = {group.group_name: name for name, group in names.items()}
        self.point_to_point = point_to_point
        self.bytes_sent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.calls: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: tuple[Any, ...]) -> None:
        count_bytes = _BYTES_SENT.get(operation)
        if count_bytes is None:
            return
        group = next(iter(_groups(args)))
        if group.size() == 1:
            return
        default = self.point_to_point if operation == "send" else "other"
        name = self.names.get(group.group_name, default)
        self.bytes_sent[name][operation.strip("_")] += count_bytes(args, group.size())
        self.calls[name][operation.strip("_")] += 1

    def total(self, group: str) -> float:
        """Return the bytes sent in one group in all operations."""
        return sum(self.bytes_sent[group].values())

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Return `bytes_sent` as plain nested dictionaries with rounded numbers."""
        return {
            group: {operation: round(count) for operation, count in operations.items()}
            for group, operations in self.bytes_sent.items()
        }


def gather_communication_counters(counter: CommunicationCounter) -> list[dict[str, Any]] | None:
    """Gather the counters of all ranks on rank 0; every rank must call it.

    Returns:
        On rank 0 one entry `{"ranks": [0, 2], "sent": counter.as_dict()}` for each set of ranks with equal
        counts; None on the other ranks.
    """
    is_rank0, sent = dist.get_rank() == 0, counter.as_dict()
    by_rank: list[dict[str, dict[str, int]]] | None = [{}] * dist.get_world_size() if is_rank0 else None
    dist.gather_object(sent, by_rank)
    if by_rank is None:
        return None
    entries: list[dict[str, Any]] = []
    for rank, rank_sent in enumerate(by_rank):
        for entry in entries:
            if entry["sent"] == rank_sent:
                entry["ranks"].append(rank)
                break
        else:
            entries.append({"ranks": [rank], "sent": rank_sent})
    return entries


def _groups(args: Iterable[Any]) -> Iterable[dist.ProcessGroup]:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                yield dist.ProcessGroup.unbox(argument)
            except (TypeError, RuntimeError):
                continue  # another script object, such as the reduce operation


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _all_reduce(args: tuple[Any, ...], size: int) -> float:
    return 2 * (size - 1) / size * _bytes(args[0])


def _share_of_output(args: tuple[Any, ...], size: int) -> float:
    return (size - 1) / size * _bytes(args[0])


def _share_of_input(args: tuple[Any, ...], size: int) -> float:
    return (size - 1) / size * _bytes(args[1])


def _all_to_all_single(args: tuple[Any, ...], size: int) -> float:
    # alltoall_base_(output, input, group, output_split_sizes, input_split_sizes, timeout)
    source, group, input_splits = args[1], next(iter(_groups(args))), args[4]
    if not input_splits:
        return (size - 1) / size * _bytes(source)
    row_bytes: float = _bytes(source) / max(1, source.shape[0])
    # The rows for this rank itself are not sent.
    rows: int = sum(input_splits) - input_splits[group.rank()]
    return row_bytes * rows


# Operation -> bytes that a rank sends, from the arguments of the dispatcher (outputs, inputs, group, ...) and
# the size of the group.
_BYTES_SENT: dict[str, Callable[[tuple[Any, ...], int], float]] = {
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce,
    "_allgather_base_": _share_of_output,
    "allgather_": _share_of_output,
    "allgather_into_tensor_coalesced_": _share_of_output,
    "_reduce_scatter_base_": _share_of_input,
    "reduce_scatter_": _share_of_input,
    "reduce_scatter_tensor_coalesced_": _share_of_input,
    "alltoall_base_": _all_to_all_single,
    "alltoall_": _share_of_input,
    "broadcast_": _share_of_output,
    "send": lambda args, size: float(_bytes(args[0])),
}
