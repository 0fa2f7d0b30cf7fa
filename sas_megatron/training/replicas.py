"""Checks that weights which several ranks replicate are equal on these ranks, bit for bit.

A parameter that is sharded over the tensor ranks has a replica on each data and context rank; any other
parameter has a replica on each tensor rank as well. Replicas drift apart if a gradient reduction is missing,
if memory is faulty, or if an operation is not deterministic; the loss hardly shows it.
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
# Bounds the memory of the int64 copies that `checksum` makes.
_ELEMENTS_PER_BLOCK = 2**22
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Pipeline rank, parameter name, and the tensor rank if the parameter is sharded over the tensor ranks.
_ReplicaKey = tuple[int, str, int | None]


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Return a checksum of a tensor's bits: int64 without dimensions.

    It is the sum, modulo 2⁶⁴, of the elements' bits, each multiplied by an odd number that depends on the
    element's index. A change of one element always changes it. Changes of several elements practically never
    cancel.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGER_OF_SIZE[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for first in range(0, bits.numel(), _ELEMENTS_PER_BLOCK):
        block = bits[first : first + _ELEMENTS_PER_BLOCK].to(torch.int64)
        indices = torch.arange(first + 1, first + 1 + block.numel(), device=tensor.device)
        total += (block * (indices * _MULTIPLIER).bitwise_or_(1)).sum()
    return total


def find_drift(model_chunks: Sequence[Any], topology: Topology) -> str | None:
    """Return which weights differ between which ranks, or None if all replicas are equal.

    Every rank must call it, and the result is the same on all ranks.
    """
    parameters = {
        global_name(chunk, name): parameter
        for chunk in model_chunks
        for name, parameter in chunk.named_parameters()
    }
    is_sharded = [getattr(parameter, "tensor_model_parallel", False) for parameter in parameters.values()]
    sums = torch.stack([checksum(parameter) for parameter in parameters.values()])
    num_differing = _count_differing(topology.data_group, sums)
    replicated = ~torch.tensor(is_sharded, device=sums.device)
    num_differing += _count_differing(topology.tensor_group, sums[replicated])
    total = torch.tensor(float(num_differing), device=topology.device)
    topology.sum_over_all_ranks(total)
    if not total.item():
        return None
    local_sums: dict[_ReplicaKey, int] = {
        (topology.pipeline_rank, name, topology.tensor_rank if sharded else None): value
        for name, sharded, value in zip(parameters, is_sharded, sums.tolist(), strict=True)
    }
    return describe_drift(gather_from_ranks(local_sums))


def _count_differing(group: dist.ProcessGroup, sums: torch.Tensor) -> int:
    """Return the number of checksums that are not equal on all ranks of the group."""
    lowest, highest = sums.clone(), sums.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return int((lowest != highest).sum().item())


def describe_drift(by_rank: Sequence[dict[_ReplicaKey, int]], *, max_names: int = 3) -> str:
    """Return `NAME differs between ranks 0, 2-3 and rank 1` for the first weights that differ.

    Args:
        by_rank: The checksums of each rank's replicas.
        max_names: Number of weights to name.
    """
    holders: dict[_ReplicaKey, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, sums in enumerate(by_rank):
        for key, value in sums.items():
            holders[key][value].append(rank)
    lines = []
    for (_stage, name, _tensor_rank), by_value in holders.items():
        if len(by_value) > 1:
            groups = [
                f"{'ranks' if len(ranks) > 1 else 'rank'} {join_ranges(ranks)}" for ranks in by_value.values()
            ]
            lines.append(f"{name} differs between {' and '.join(groups)}")
    more = [f"and {len(lines) - max_names} more"] if len(lines) > max_names else []
    return "; ".join(lines[:max_names] + more)
