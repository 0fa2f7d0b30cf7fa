"""Measure this machine and write its hardware file, while all processes work at once with one thread each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from sas_megatron.config.loading import build_run_config
from sas_megatron.planning.hardware_file import BYTES_PER_GIB, AttainableShares, Hardware, LinkFigures
from sas_megatron.planning.rank_processes import run_on_ranks
from sas_megatron.platform.local_machine import describe_processor, read_memory_bytes

# Duration of each measurement: many time slices of the operating system's scheduler.
MEASURED_SECONDS = 0.4


def measure_this_machine(*, num_processes: int) -> Hardware:
    """Measure the speed of each of `num_processes` processes that use this machine at the same time.

    The measurement takes about ten seconds.
    """
    by_rank = run_on_ranks(measure_rank, world_size=num_processes)
    return build_hardware(by_rank, num_processes=num_processes)


def build_hardware(by_rank: list[dict[str, float]], *, num_processes: int) -> Hardware:
    """Build the hardware file from the mean of the ranks' measurements."""
    mean = {name: statistics.fmean(measured[name] for measured in by_rank) for name in by_rank[0]}
    link = None
    if num_processes > 1:
        link = LinkFigures(
            gigabytes_per_second=mean["link_bytes_per_second"] / 1e9,
            latency_microseconds=mean["link_latency_seconds"] * 1e6,
        )
    return Hardware(
        name=f"{describe_processor()['processor']}, {num_processes} processes of one thread, measured",
        device="cpu",
        memory_gib=read_memory_bytes("/proc/meminfo", "MemTotal") / num_processes / BYTES_PER_GIB,
        matrix_teraflops={dtype: mean[dtype] / 1e12 for dtype in ("float32", "bfloat16")},
        memory_gigabytes_per_second=mean["memory_bytes_per_second"] / 1e9,
        node_link=link,
        network_link=None,
        devices_per_node=num_processes,
        reserved_gib=0.0,
        fragmentation=0.0,
        operation_microseconds=mean["operation_seconds"] * 1e6,
        attainable=AttainableShares(
            matrix=1.0,
            convolution=mean["convolution"] / mean["float32"],
            attention=mean["attention"] / mean["float32"],
            memory=1.0,
            link=1.0,
        ),
    )


def measure_rank() -> dict[str, float]:
    """Measure the rates of FLOPs, bytes, operations and communication on a rank of an initialized world."""
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
        measured.update(_measure_link())
    return measured


def _seconds(work: Callable[[], Any]) -> float:
    """Return the mean seconds of a call while all ranks work.

    The mean is used rather than the median, since several ranks may share a processor.
    """
    work()
    dist.barrier()
    calls = 0
    start = time.perf_counter()
    while time.perf_counter() - start < MEASURED_SECONDS:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls


def _product_rate(dtype: torch.dtype) -> float:
    # The three matrix products of a linear layer: 1024 tokens, 512 input and 2048 output features.
    tokens, inputs, outputs = 1024, 512, 2048
    x, gradient = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
    weight = torch.randn(outputs, inputs).to(dtype)

    def work() -> None:
        for left, right in ((x, weight.t()), (gradient, weight), (gradient.t(), x)):
            left @ right

    return 3 * 2 * tokens * inputs * outputs / _seconds(work)


def _convolution_rate() -> float:
    # A convolution of the head simulation: 8 heads to 24, kernel 3, 64 features, 512 tokens.
    tokens, heads, simulated_heads, head_dim, kernel = 512, 8, 24, 64, 3
    weight = torch.randn(simulated_heads, heads, kernel, requires_grad=True)
    columns = torch.randn(tokens, heads, head_dim, requires_grad=True)

    def work() -> None:
        F.conv1d(columns, weight, padding=kernel // 2).sum().backward()

    return 3 * 2 * tokens * simulated_heads * heads * kernel * head_dim / _seconds(work)


def _attention_rate() -> float:
    # Executed FLOPs: two matrix products forward and five backward, half of each for causal attention.
    batch, heads, length, head_dim = 2, 4, 512, 64
    query, key, value = (torch.randn(batch, heads, length, head_dim, requires_grad=True) for _ in range(3))

    def work() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True).sum().backward()

    return 7 * 2 * batch * heads * length * length * head_dim / 2 / _seconds(work)


def _memory_rate() -> float:
    # Operands exceed the processor's caches, and the result is newly allocated, as in most model operations.
    source = torch.randn(2**22)
    return 2 * source.numel() * 4 / _seconds(lambda: source + 1.0)


def _operation_seconds() -> float:
    """Return the launch time of an operation of the training code: Python, autograd and the dispatcher.

    The tensors are so small that their computation does not matter.
    """
    from sas_megatron.config.parallel import ParallelConfig
    from sas_megatron.distributed.topology import joined_groups
    from sas_megatron.planning.memory_meter import MemoryMeter
    from sas_megatron.planning.rank_estimate import StepProfiler

    config = build_run_config(_TINY)
    with joined_groups(ParallelConfig(), device=torch.device("cpu"), seed=1) as topology:
        profiler = StepProfiler(config, topology, MemoryMeter())
        # With many microbatches the exchange of the gradients matters little. Every rank must take part in
        # it, so the number of steps is fixed.
        num_microbatches, num_steps = 8, 5
        profiler.run_step(num_microbatches)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(num_steps):
            profiler.run_step(num_microbatches)
        seconds = (time.perf_counter() - start) / num_steps
        work = profiler.profile_step(num_microbatches)
        return seconds / sum((work.microbatches + work.update).operations.values())


_TINY: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 8, "ffn_hidden_size": 8, "vocab_size": 8, "vocab_multiple": 8},
    "attention": {"kind": "mha", "num_heads": 2, "head_dim": 4},
    "data": {"prefixes": ["none"], "tokenizer": "none", "sequence_length": 8},
    "optimizer": {"learning_rate": 0.0001},
    "training": {"num_steps": 2**40, "global_batch_size": 2**10, "micro_batch_size": 1},
    "logging": {"run_directory": "none"},
}


def _measure_link() -> dict[str, float]:
    """Return the bytes sent per second in the ring convention, and the latency of one message of the ring."""
    ranks = dist.get_world_size()
    large, small = torch.zeros(2**21), torch.zeros(1)
    large_bytes = 2 * (ranks - 1) / ranks * large.numel() * 4
    hops = max(1, (ranks - 1).bit_length())
    # The number of calls is fixed, since every rank must take part in each.
    seconds = {}
    for name, tensor, calls in (("large", large, 10), ("small", small, 200)):
        dist.all_reduce(tensor)
        dist.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            dist.all_reduce(tensor)
        seconds[name] = (time.perf_counter() - start) / calls
    return {
        "link_bytes_per_second": large_bytes / max(seconds["large"] - seconds["small"], 1e-9),
        "link_latency_seconds": seconds["small"] / hops,
    }
