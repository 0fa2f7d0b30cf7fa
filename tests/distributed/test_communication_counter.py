"""The communication counter counts each collective by the ring convention, under the name of its group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sas_megatron.config.parallel import ParallelConfig
from tests.rank_pool import in_layout

ROWS, WIDTH = 3, 7  # a float32 tensor of this shape has 84 bytes


def _all_reduce(group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.ones(ROWS, WIDTH), group=group)


def _all_reduce_half(group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.ones(ROWS, WIDTH, dtype=torch.bfloat16), group=group)


def _all_gather(group: dist.ProcessGroup) -> None:
    dist.all_gather_into_tensor(torch.empty(group.size() * ROWS, WIDTH), torch.ones(ROWS, WIDTH), group=group)


def _all_gather_list(group: dist.ProcessGroup) -> None:
    gathered = [torch.empty(ROWS, WIDTH) for _ in range(group.size())]
    dist.all_gather(gathered, torch.ones(ROWS, WIDTH), group=group)


def _reduce_scatter(group: dist.ProcessGroup) -> None:
    dist.reduce_scatter_tensor(torch.empty(ROWS, WIDTH), torch.ones(group.size() * ROWS, WIDTH), group=group)


def _all_to_all(group: dist.ProcessGroup) -> None:
    sent = torch.ones(group.size() * ROWS, WIDTH)
    dist.all_to_all_single(torch.empty_like(sent), sent, group=group)


def _all_to_all_uneven(group: dist.ProcessGroup) -> None:
    # Each rank sends one row to rank 0, two rows to rank 1, and so on, including itself.
    sizes, num_local = list(range(1, group.size() + 1)), group.rank() + 1
    received = torch.empty(num_local * group.size(), WIDTH)
    sent = torch.ones(sum(sizes), WIDTH)
    dist.all_to_all_single(received, sent, [num_local] * group.size(), sizes, group=group)


def _broadcast(group: dist.ProcessGroup) -> None:
    dist.broadcast(torch.ones(ROWS, WIDTH), src=0, group=group)


def _send_to_the_next(group: dist.ProcessGroup) -> None:
    rank, size = group.rank(), group.size()
    sending = dist.isend(torch.ones(ROWS, WIDTH), (rank + 1) % size, group=group)
    dist.recv(torch.empty(ROWS, WIDTH), (rank - 1) % size, group=group)
    assert sending is not None
    sending.wait()


def _counted(collective: Callable[[dist.ProcessGroup], None], tensor: int, named: bool) -> dict[str, Any]:
    """Return a rank's counts after one collective over the tensor group."""
    from sas_megatron.distributed.communication_counter import CommunicationCounter

    group = in_layout(ParallelConfig(tensor=tensor)).tensor_group
    with CommunicationCounter({"tensor": group} if named else {}) as counter:
        collective(group)
    collective(group)  # not counted, because the counter is not entered
    counted = counter.as_dict()
    assert counter.total("tensor" if named else "other") == sum(
        sum(kind.values()) for kind in counted.values()
    )
    return counted


TENSOR_BYTES = ROWS * WIDTH * 4

# Collective -> its name in the counts, and the bytes that rank r of n sends.
BYTES: dict[Callable[[dist.ProcessGroup], None], tuple[str, Callable[[int, int], float]]] = {
    _all_reduce: ("allreduce", lambda _rank, size: 2 * (size - 1) / size * TENSOR_BYTES),
    _all_reduce_half: ("allreduce", lambda _rank, size: (size - 1) / size * TENSOR_BYTES),
    _all_gather: ("allgather_base", lambda _rank, size: (size - 1) * TENSOR_BYTES),
    _all_gather_list: ("allgather", lambda _rank, size: (size - 1) * TENSOR_BYTES),
    _reduce_scatter: ("reduce_scatter_base", lambda _rank, size: (size - 1) * TENSOR_BYTES),
    _all_to_all: ("alltoall_base", lambda _rank, size: (size - 1) * TENSOR_BYTES),
    _all_to_all_uneven: (
        "alltoall_base",
        lambda rank, size: (sum(range(1, size + 1)) - (rank + 1)) * WIDTH * 4,
    ),
    _broadcast: ("broadcast", lambda _rank, size: (size - 1) / size * TENSOR_BYTES),
    _send_to_the_next: ("send", lambda _rank, _size: TENSOR_BYTES),
}


@pytest.mark.parametrize("collective", BYTES, ids=lambda collective: collective.__name__.strip("_"))
@pytest.mark.parametrize("size", [2, 4])
def test_a_collective_counts_by_the_ring_convention(ranks: Any, collective: Any, size: int) -> None:
    operation, rule = BYTES[collective]
    assert ranks(size).run(_counted, collective, size, True) == [
        {"tensor": {operation: round(rule(rank, size))}} for rank in range(size)
    ]


def test_unnamed_groups_count_as_other(ranks: Any) -> None:
    assert ranks(2).run(_counted, _all_reduce, 2, False) == [{"other": {"allreduce": TENSOR_BYTES}}] * 2


def test_a_group_of_one_rank_sends_nothing(ranks: Any) -> None:
    assert ranks(1).run(_counted, _all_reduce, 1, True) == [{}]


def _gather_counters() -> Any:
    from sas_megatron.distributed.communication_counter import (
        CommunicationCounter,
        gather_communication_counters,
    )

    topology = in_layout(ParallelConfig(tensor=2))
    with CommunicationCounter(topology.groups()) as counter:
        _all_to_all_uneven(topology.tensor_group)
        _all_reduce(topology.data_group)
        _all_reduce(topology.context_group)
    return gather_communication_counters(counter)


def test_ranks_with_equal_counts_share_one_entry(ranks: Any) -> None:
    on_rank0, *on_others = ranks(4).run(_gather_counters)
    data = {"allreduce": TENSOR_BYTES}
    row = WIDTH * 4
    assert on_rank0 == [
        {"ranks": [0, 2], "sent": {"tensor": {"alltoall_base": 2 * row}, "data": data}},
        {"ranks": [1, 3], "sent": {"tensor": {"alltoall_base": row}, "data": data}},
    ]
    assert on_others == [None, None, None]


def _backward_bytes() -> tuple[dict[str, Any], dict[str, Any]]:
    from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region

    from sas_megatron.distributed.communication_counter import CommunicationCounter

    group = in_layout(ParallelConfig(tensor=2)).tensor_group
    local = torch.ones(ROWS, WIDTH, requires_grad=True)
    forward, backward = CommunicationCounter({"tensor": group}), CommunicationCounter({"tensor": group})
    with forward:
        gathered = all_gather_last_dim_from_tensor_parallel_region(local, group)
    with backward:
        gathered.sum().backward()
    return forward.as_dict(), backward.as_dict()


def test_collectives_of_the_backward_pass_are_counted(ranks: Any) -> None:
    for forward, backward in ranks(2).run(_backward_bytes):
        assert forward == {"tensor": {"allgather_base": TENSOR_BYTES}}
        assert backward == {"tensor": {"reduce_scatter_base": TENSOR_BYTES}}
