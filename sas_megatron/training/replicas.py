"""Whether weights that several ranks hold copies of are equal on them, bit for bit.

A parameter that is shared out over the tensor ranks has a copy on each data and context rank, any
other on each tensor rank too. Copies drift where a sum of gradients is missing, memory fails, or an
operation does not give the same twice; the loss hardly shows it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.distributed.topology import Topology
from sas_megatron.fault_tolerance.final_report import join_ranges
from sas_megatron.model.initialization import global_name

# 2⁶⁴ over the golden ratio, as a signed number (Knuth's multiplicative hashing).
_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
_ELEMENTS_AT_ONCE = 2**22
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Pipeline rank, name, and the tensor rank where each has a part of its own.
_Copy = tuple[int, str, int | None]


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum, modulo 2⁶⁴, of the elements' bits, each times an odd number of its place: int64, no axes.

    If one element changes, so does it; that changes of several cancel is as good as out of the question.
    """
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, bits.numel(), _ELEMENTS_AT_ONCE):
        piece = bits[first : first + _ELEMENTS_AT_ONCE].to(torch.int64)
        places = torch.arange(first + 1, first + 1 + piece.numel(), device=tensor.device)
        total += (piece * (places * _MULTIPLIER).bitwise_or_(1)).sum()
    return total


def find_drift(pieces: Sequence[Any], topology: Topology) -> str | None:
    """Names the tensors whose copies differ and the ranks between which they do; every rank must call it.

    It is None, or the same text, on all ranks.
    """
    parameters = {
        global_name(piece, name): parameter
        for piece in pieces
        for name, parameter in piece.named_parameters()
    }
    is_shared = [getattr(parameter, "tensor_model_parallel", False) for parameter in parameters.values()]
    sums = torch.stack([checksum(parameter) for parameter in parameters.values()])
    differing = _differ_over(topology.data_group, sums)
    differing += _differ_over(topology.tensor_group, sums[~torch.tensor(is_shared, device=sums.device)])
    total = torch.tensor(float(differing), device=topology.device)
    topology.sum_over_all_ranks(total)
    if not total.item():
        return None
    own: dict[_Copy, int] = {
        (topology.pipeline_rank, name, topology.tensor_rank if shared else None): value
        for name, shared, value in zip(parameters, is_shared, sums.tolist(), strict=True)
    }
    return describe_drift(gather_from_ranks(own))


def _differ_over(group: dist.ProcessGroup, sums: torch.Tensor) -> int:
    """How many of the sums are not the same on all ranks of the group."""
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return int((lowest != highest).sum().item())


def describe_drift(of_ranks: Sequence[dict[_Copy, int]], *, most: int = 3) -> str:
    """`NAME differs between ranks 0, 2-3 and rank 1`, for the first few names.

    Args:
        of_ranks: Checksums of each rank's copies.
        most: How many to name.
    """
    holders: dict[_Copy, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, sums in enumerate(of_ranks):
        for copy, value in sums.items():
            holders[copy][value].append(rank)
    named = []
    for (_stage, name, _part), by_value in holders.items():
        if len(by_value) > 1:
            groups = [
                f"{'ranks' if len(ranks) > 1 else 'rank'} {join_ranges(ranks)}" for ranks in by_value.values()
            ]
            named.append(f"{name} differs between {' and '.join(groups)}")
    more = [f"and {len(named) - most} more"] if len(named) > most else []
    return "; ".join(named[:most] + more)
