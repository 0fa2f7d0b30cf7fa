"""A hypothetical machine with round figures, any of which a test can replace."""

from __future__ import annotations

from typing import Any

from sas_megatron.planning.hardware_file import AttainableShares, Hardware, LinkFigures


def toy_machine(
    *, memory_gib: float = 1.0, link_gigabytes_per_second: float = 1.0, **figures: Any
) -> Hardware:
    """Build a machine of eight GPUs per node that attains its peak figures and starts operations at once.

    Args:
        memory_gib: Memory of one device.
        link_gigabytes_per_second: Bandwidth within a node and between nodes.
        figures: Other fields of `Hardware`.
    """
    link = LinkFigures(gigabytes_per_second=link_gigabytes_per_second, latency_microseconds=0.001)
    defaults: dict[str, Any] = {
        "name": "a toy",
        "device": "gpu",
        "memory_gib": memory_gib,
        "matrix_teraflops": {"float32": 1.0, "bfloat16": 1.0},
        "memory_gigabytes_per_second": 1000.0,
        "node_link": link,
        "network_link": link,
        "devices_per_node": 8,
        "reserved_gib": 0.0,
        "fragmentation": 0.0,
        "operation_microseconds": 0.001,
        "attainable": AttainableShares(matrix=1.0, convolution=1.0, attention=1.0, memory=1.0, link=1.0),
    }
    return Hardware(**{**defaults, **figures})
