"""Made-up machines whose figures decide a search."""

from __future__ import annotations

from sas_megatron.planning.hardware_file import AttainableShares, Hardware, LinkFigures


def toy_machine(*, memory_gib: float, wire_gigabytes_per_second: float) -> Hardware:
    """Eight GPUs a node, all of whose figures are attained."""
    wire = LinkFigures(gigabytes_per_second=wire_gigabytes_per_second, latency_microseconds=0.001)
    return Hardware(
        name="a toy",
        device="gpu",
        memory_gib=memory_gib,
        matrix_teraflops={"float32": 1.0, "bfloat16": 1.0},
        memory_gigabytes_per_second=1000.0,
        node_wire=wire,
        network_wire=wire,
        devices_per_node=8,
        reserved_gib=0.0,
        fragmentation=0.0,
        operation_microseconds=0.001,
        attainable=AttainableShares(matrix=1.0, convolution=1.0, attention=1.0, memory=1.0, wire=1.0),
    )
