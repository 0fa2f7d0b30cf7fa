"""Counts what this rank sends in collectives, by group and operation, as they pass torch's dispatcher.

Counting follows the ring convention, in which a rank of a group of n that moves a tensor of b
bytes sends: all_reduce 2·(n-1)/n·b; all_gather, reduce_scatter (n-1)/n of the whole tensor;
all_to_all the (n-1)/n of its input that leaves it; broadcast and point-to-point what leaves it. (gloo
sends twice as much for a reduce_scatter; else network interfaces count this and the protocols' headers.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from sas_megatron.distributed.topology import Topology


class CommunicationCounter(TorchDispatchMode):
    """While entered, adds up the bytes of every collective of this process.

    `bytes_sent` maps group name -> operation -> bytes, `calls` the same -> number of collectives.
    Groups are named by `names`; others count under "other", messages between two ranks in them under
    `sends` (between two pipeline stages Megatron-core sends over the world's group).
    """

    def __init__(self, names: dict[str, dist.ProcessGroup], *, sends: str = "other") -> None:
        super().__init__()
        self.names = {group.group_name: name for name, group in names.items()}
        self.sends = sends
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
        rule = _BYTES_SENT.get(operation)
        if rule is None:
            return
        group = next(iter(_groups(args)))
        if group.size() == 1:
            return
        name = self.names.get(group.group_name, self.sends if operation == "send" else "other")
        self.bytes_sent[name][operation.strip("_")] += rule(args, group.size())
        self.calls[name][operation.strip("_")] += 1

    def total(self, group: str) -> float:
        """Bytes sent in one group, over all operations."""
        return sum(self.bytes_sent[group].values())

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Plain nested mappings, bytes rounded."""
        return {
            group: {operation: round(count) for operation, count in operations.items()}
            for group, operations in self.bytes_sent.items()
        }


def build_communication_counter(topology: Topology) -> CommunicationCounter:
    """The ledger of a run's rank; the gradient norm's group and others come under "other"."""
    return CommunicationCounter(topology.groups(), sends="pipeline")


def gather_communication_counters(ledger: CommunicationCounter) -> list[dict[str, Any]] | None:
    """What every rank sent: `{"ranks": [0, 2], "sent": ledger}` for each set of ranks that sent the same.

    Every rank must call it. On the others than rank 0 it is None.
    """
    is_first, sent = dist.get_rank() == 0, ledger.as_dict()
    of_ranks: list[dict[str, dict[str, int]]] | None = [{}] * dist.get_world_size() if is_first else None
    dist.gather_object(sent, of_ranks)
    if of_ranks is None:
        return None
    alike: list[dict[str, Any]] = []
    for rank, of_rank in enumerate(of_ranks):
        for entry in alike:
            if entry["sent"] == of_rank:
                entry["ranks"].append(rank)
                break
        else:
            alike.append({"ranks": [rank], "sent": of_rank})
    return alike


def _groups(args: Iterable[Any]) -> Iterable[dist.ProcessGroup]:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                yield dist.ProcessGroup.unbox(argument)
            except (TypeError, RuntimeError):
                continue  # the reduce operation is a script object too


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _all_reduce(args: tuple[Any, ...], size: int) -> float:
    return 2 * (size - 1) / size * _bytes(args[0])


def _output_passes(args: tuple[Any, ...], size: int) -> float:
    return (size - 1) / size * _bytes(args[0])


def _input_passes(args: tuple[Any, ...], size: int) -> float:
    return (size - 1) / size * _bytes(args[1])


def _all_to_all_single(args: tuple[Any, ...], size: int) -> float:
    # alltoall_base_(output, input, group, output_split_sizes, input_split_sizes, timeout)
    source, group, input_splits = args[1], next(iter(_groups(args))), args[4]
    if not input_splits:
        return (size - 1) / size * _bytes(source)
    row_bytes: float = _bytes(source) / max(1, source.shape[0])
    rows: int = sum(input_splits) - input_splits[group.rank()]
    return row_bytes * rows


# Arguments are those of the dispatcher: outputs first, then inputs, then the group.
_BYTES_SENT: dict[str, Callable[[tuple[Any, ...], int], float]] = {
    "allreduce_": _all_reduce,
    "allreduce_coalesced_": _all_reduce,
    "_allgather_base_": _output_passes,
    "allgather_": _output_passes,
    "allgather_into_tensor_coalesced_": _output_passes,
    "_reduce_scatter_base_": _input_passes,
    "reduce_scatter_": _input_passes,
    "reduce_scatter_tensor_coalesced_": _input_passes,
    "alltoall_base_": _all_to_all_single,
    "alltoall_": _input_passes,
    "broadcast_": _output_passes,
    "send": lambda args, size: float(_bytes(args[0])),
}
