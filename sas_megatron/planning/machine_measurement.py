"""This machine's hardware file, measured: every process at work at once, one thread each, as in training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from sas_megatron.config.loading import build_run_config
from sas_megatron.planning.hardware_file import BYTES_PER_GIB, AttainableShares, Hardware, WireFigures
from sas_megatron.planning.rank_processes import run_on_ranks
from sas_megatron.platform.local_machine import describe_processor, read_memory_bytes

# For each figure: many turns of the processor's scheduler.
MEASURED_SECONDS = 0.4


def measure_this_machine(*, num_processes: int) -> Hardware:
    """What each of `num_processes` gets of this machine while the others work too; about ten seconds."""
    by_rank = run_on_ranks(measure_here, world_size=num_processes)
    return hardware_from(by_rank, num_processes=num_processes)


def hardware_from(by_rank: list[dict[str, float]], *, num_processes: int) -> Hardware:
    """The hardware file of ranks' measurements: the mean over the ranks."""
    mean = {name: statistics.fmean(measured[name] for measured in by_rank) for name in by_rank[0]}
    wire = None
    if num_processes > 1:
        wire = WireFigures(
            gigabytes_per_second=mean["wire_bytes_per_second"] / 1e9,
            latency_microseconds=mean["wire_latency_seconds"] * 1e6,
        )
    return Hardware(
        name=f"{describe_processor()['processor']}, {num_processes} processes of one thread, measured",
        device="cpu",
        memory_gib=read_memory_bytes("/proc/meminfo", "MemTotal") / num_processes / BYTES_PER_GIB,
        matrix_teraflops={dtype: mean[dtype] / 1e12 for dtype in ("float32", "bfloat16")},
        memory_gigabytes_per_second=mean["memory_bytes_per_second"] / 1e9,
        node_wire=wire,
        network_wire=None,
        devices_per_node=num_processes,
        reserved_gib=0.0,
        fragmentation=0.0,
        operation_microseconds=mean["operation_seconds"] * 1e6,
        attainable=AttainableShares(
            matrix=1.0,
            convolution=mean["convolution"] / mean["float32"],
            attention=mean["attention"] / mean["float32"],
            memory=1.0,
            wire=1.0,
        ),
    )


def measure_here() -> dict[str, float]:
    """On a rank of a joined world: rates of FLOPs, bytes and operations, and of the wire."""
    torch.set_num_threads(1)
    measured = {
        "float32": _product_rate(torch.float32),
        "bfloat16": _product_rate(torch.bfloat16),
        "convolution": _convolution_rate(),
        "attention": _attention_rate(),
        "memory_bytes_per_second": _memory_rate(),
        "operation_seconds": _operation_seconds(),
    }
    if dist.get_world_size() > 1:
        measured.update(_wire())
    return measured


def _seconds(work: Callable[[], Any]) -> float:
    """Mean seconds of a call while all ranks work (no median: they may share processors in turns)."""
    work()
    dist.barrier()
    calls = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < MEASURED_SECONDS:
        work()
        calls += 1
    return (time.perf_counter() - begun) / calls


def _product_rate(dtype: torch.dtype) -> float:
    # The three products of a linear layer: 1024 tokens, 512 features to 2048.
    tokens, narrow, wide = 1024, 512, 2048
    inputs, gradient = torch.randn(tokens, narrow).to(dtype), torch.randn(tokens, wide).to(dtype)
    weight = torch.randn(wide, narrow).to(dtype)

    def work() -> None:
        for left, right in ((inputs, weight.t()), (gradient, weight), (gradient.t(), inputs)):
            left @ right

    return 3 * 2 * tokens * narrow * wide / _seconds(work)


def _convolution_rate() -> float:
    # Head simulation: 8 heads to 24, kernel 3, 64 features, 512 tokens.
    tokens, heads, simulated, width, kernel = 512, 8, 24, 64, 3
    weight = torch.randn(simulated, heads, kernel, requires_grad=True)
    columns = torch.randn(tokens, heads, width, requires_grad=True)

    def work() -> None:
        F.conv1d(columns, weight, padding=kernel // 2).sum().backward()

    return 3 * 2 * tokens * simulated * heads * kernel * width / _seconds(work)


def _attention_rate() -> float:
    # Executed FLOPs: two products forward, five backward, half of each.
    batch, heads, length, width = 2, 4, 512, 64
    query, key, value = (torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3))

    def work() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    return 7 * 2 * batch * heads * length * length * width / 2 / _seconds(work)


def _memory_rate() -> float:
    # Larger than the processor's caches, and into new memory, as most of a model's operations write.
    source = torch.randn(2**22)
    return 2 * source.numel() * 4 / _seconds(lambda: source + 1.0)


def _operation_seconds() -> float:
    """Of an operation of the training code on tensors too small to matter: Python, autograd and dispatch."""
    from sas_megatron.config.parallel import ParallelConfig
    from sas_megatron.distributed.topology import joined_groups
    from sas_megatron.planning.memory_meter import MemoryMeter
    from sas_megatron.planning.rank_simulation import Stepper

    config = build_run_config(_TINY)
    with joined_groups(ParallelConfig(), device=torch.device("cpu"), seed=1) as topology:
        stepper = Stepper(config, topology, MemoryMeter())
        # Many microbatches for each exchange of gradients, and for its sake as many steps on every rank.
        num_microbatches, num_steps = 8, 5
        stepper.run(num_microbatches)
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(num_steps):
            stepper.run(num_microbatches)
        seconds = (time.perf_counter() - begun) / num_steps
        counted = stepper.step(num_microbatches)
        return seconds / sum((counted.microbatches + counted.update).operations.values())


_TINY: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "vocab_size": 8, "vocab_multiple": 8},
    "attention": {"kind": "mha", "num_heads": 2, "head_dim": 4},
    "data": {"prefixes": ["none"], "tokenizer": "none", "sequence_length": 8},
    "optimizer": {"learning_rate": 0.0001},
    "training": {"num_steps": 2**40, "global_batch_size": 2**10, "micro_batch_size": 1},
    "logging": {"run_directory": "none"},
}


def _wire() -> dict[str, float]:
    """Bytes sent a second in the ring convention, and the latency of one of its messages."""
    ranks = dist.get_world_size()
    large, small = torch.zeros(2**21), torch.zeros(1)
    large_bytes = 2 * (ranks - 1) / ranks * large.numel() * 4
    hops = max(1, (ranks - 1).bit_length())
    # For a fixed number of times: all ranks must take part in each.
    seconds = {}
    for name, tensor, times in (("large", large, 10), ("small", small, 200)):
        dist.all_reduce(tensor)
        dist.barrier()
        begun = time.perf_counter()
        for _ in range(times):
            dist.all_reduce(tensor)
        seconds[name] = (time.perf_counter() - begun) / times
    return {
        "wire_bytes_per_second": large_bytes / max(seconds["large"] - seconds["small"], 1e-9),
        "wire_latency_seconds": seconds["small"] / hops,
    }
