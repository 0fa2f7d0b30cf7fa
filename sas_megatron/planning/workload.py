"""Work of a rank in a step: counts of operations and communication, to add and to scale. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["matrix", "convolution", "attention", "elementwise"]
# group -> operation of the communication counter -> bytes or calls
ByGroup = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Operation:
    """One kind of call, with its computation and memory traffic, independent of the hardware."""

    name: str
    kind: Kind
    dtype: str
    # A multiply-add is two FLOPs. Fused causal attention counts all S² scores, as in all of this package.
    flops: int
    # FLOPs that a kernel computes which skips the masked half of causal attention.
    executed_flops: int
    # Bytes read and written, each operand once.
    traffic_bytes: int


@dataclass(frozen=True)
class Workload:
    """Calls of each operation, and bytes sent and calls of each collective, by one rank."""

    operations: dict[Operation, float] = field(default_factory=dict)
    bytes_sent: ByGroup = field(default_factory=dict)
    collective_calls: ByGroup = field(default_factory=dict)

    def __add__(self, other: Workload) -> Workload:
        """Return the sum of two workloads."""
        return Workload(
            _add(self.operations, other.operations),
            _add_by_group(self.bytes_sent, other.bytes_sent),
            _add_by_group(self.collective_calls, other.collective_calls),
        )

    def __mul__(self, factor: float) -> Workload:
        """Return the workload with all counts multiplied by `factor`."""
        return Workload(
            {operation: factor * calls for operation, calls in self.operations.items()},
            _scale_by_group(self.bytes_sent, factor),
            _scale_by_group(self.collective_calls, factor),
        )

    @property
    def flops(self) -> float:
        """FLOPs of all operations; a multiply-add is two."""
        return sum(calls * operation.flops for operation, calls in self.operations.items())

    def group_bytes(self, group: str) -> float:
        """Return the bytes sent in one group, over all operations."""
        return sum(self.bytes_sent.get(group, {}).values())

    def rounded_bytes_sent(self) -> dict[str, dict[str, int]]:
        """Return the bytes sent in the form of `CommunicationCounter.as_dict`."""
        return {
            group: {name: round(count) for name, count in operations.items()}
            for group, operations in self.bytes_sent.items()
        }


def _add(left: dict[Operation, float], right: dict[Operation, float]) -> dict[Operation, float]:
    total: Counter[Operation] = Counter()
    for counts in (left, right):
        for operation, calls in counts.items():
            total[operation] += calls  # type: ignore[assignment]
    # Counts that cancel in a difference are dropped.
    return {operation: calls for operation, calls in total.items() if calls}


def _add_by_group(left: ByGroup, right: ByGroup) -> ByGroup:
    total: ByGroup = {}
    for counts in (left, right):
        for group, operations in counts.items():
            sums = total.setdefault(group, {})
            for name, count in operations.items():
                sums[name] = sums.get(name, 0) + count
    nonzero = {group: {name: count for name, count in sums.items() if count} for group, sums in total.items()}
    return {group: sums for group, sums in nonzero.items() if sums}


def _scale_by_group(counts: ByGroup, factor: float) -> ByGroup:
    return {
        group: {name: factor * count for name, count in operations.items()}
        for group, operations in counts.items()
    }
