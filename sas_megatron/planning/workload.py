"""What a rank does in a step, as sums that can be added and scaled. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["matrix", "convolution", "attention", "elementwise"]
# group -> operation of the ledger -> bytes or calls
ByGroup = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Operation:
    """One kind of call: how much it computes and moves, whatever hardware does it."""

    name: str
    kind: Kind
    dtype: str
    # A multiply-add is two; fused causal attention counts all S² scores, as everywhere in this package.
    flops: int
    # What a kernel that skips the hidden half of causal attention computes.
    executed_flops: int
    # Read plus written, each operand once.
    traffic_bytes: int


@dataclass(frozen=True)
class Workload:
    """Operations computed, and bytes and calls of collectives, by one rank."""

    operations: dict[Operation, float] = field(default_factory=dict)
    bytes_sent: ByGroup = field(default_factory=dict)
    collective_calls: ByGroup = field(default_factory=dict)

    def __add__(self, other: Workload) -> Workload:
        """Both together."""
        return Workload(
            _added(self.operations, other.operations),
            _added_by_group(self.bytes_sent, other.bytes_sent),
            _added_by_group(self.collective_calls, other.collective_calls),
        )

    def __mul__(self, times: float) -> Workload:
        """The same, `times` times over."""
        return Workload(
            {operation: times * calls for operation, calls in self.operations.items()},
            _scaled_by_group(self.bytes_sent, times),
            _scaled_by_group(self.collective_calls, times),
        )

    @property
    def flops(self) -> float:
        """FLOPs of all operations; a multiply-add is two."""
        return sum(calls * operation.flops for operation, calls in self.operations.items())

    def group_bytes(self, group: str) -> float:
        """Bytes sent in one group, over all operations."""
        return sum(self.bytes_sent.get(group, {}).values())

    def rounded_bytes_sent(self) -> dict[str, dict[str, int]]:
        """As `CommunicationCounter.as_dict` gives them."""
        return {
            group: {name: round(count) for name, count in operations.items()}
            for group, operations in self.bytes_sent.items()
        }


def _added(left: dict[Operation, float], right: dict[Operation, float]) -> dict[Operation, float]:
    total: Counter[Operation] = Counter()
    for part in (left, right):
        for operation, calls in part.items():
            total[operation] += calls  # type: ignore[assignment]
    # What one of the two lacks leaves nothing behind when they are subtracted.
    return {operation: calls for operation, calls in total.items() if calls}


def _added_by_group(left: ByGroup, right: ByGroup) -> ByGroup:
    total: ByGroup = {}
    for part in (left, right):
        for group, operations in part.items():
            sums = total.setdefault(group, {})
            for name, count in operations.items():
                sums[name] = sums.get(name, 0) + count
    kept = {group: {name: count for name, count in sums.items() if count} for group, sums in total.items()}
    return {group: sums for group, sums in kept.items() if sums}


def _scaled_by_group(counts: ByGroup, times: float) -> ByGroup:
    return {
        group: {name: times * count for name, count in operations.items()}
        for group, operations in counts.items()
    }
