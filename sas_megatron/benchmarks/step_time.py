"""Time complete optimizer steps of several runs on this machine, in alternation."""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sas_megatron.config.run import RunConfig
from sas_megatron.model.language_loss import Batch
from sas_megatron.planning.rank_processes import run_on_ranks
from sas_megatron.platform.device import prepare_device

if TYPE_CHECKING:
    from sas_megatron.distributed.topology import Topology

TIMED_STEPS = 3


def measure_step_seconds(configs: list[RunConfig], *, rounds: int) -> list[list[float]]:
    """Measure the steps of each config, on the number of processes that one model replica needs.

    Each round builds the model of each config again, one at a time. The tokens are random.

    Args:
        configs: Runs with the same layout.
        rounds: Number of measurements of each config.

    Returns:
        The median seconds of a step by round and config.
    """
    world_size = configs[0].parallel.model_size
    threads = max(1, (os.cpu_count() or 1) // world_size)
    by_rank = run_on_ranks(_time_on_rank, configs, rounds, world_size=world_size, threads=threads)
    # A step ends when its slowest rank has finished.
    return [[max(seconds) for seconds in zip(*ranks, strict=True)] for ranks in zip(*by_rank, strict=True)]


def _time_on_rank(configs: list[RunConfig], rounds: int) -> list[list[float]]:
    """Measure on a rank of an initialized world."""
    from sas_megatron.distributed.topology import joined_groups

    with joined_groups(configs[0].parallel, device=prepare_device(), seed=1) as topology:
        return time_rounds(configs, rounds, topology)


def time_rounds(configs: list[RunConfig], rounds: int, topology: Topology) -> list[list[float]]:
    """Return this rank's median seconds of a step by round and config."""
    return [
        [_time_steps(config, topology.data_size, topology.device) for config in configs]
        for _ in range(rounds)
    ]


def _time_steps(config: RunConfig, data_size: int, device: torch.device) -> float:
    from sas_megatron.training import build

    # The previous engine is part of reference cycles, so its memory is freed only by a garbage collection.
    gc.collect()
    torch.cuda.empty_cache()
    engine = build.build_engine(config)
    num_microbatches = config.training.num_microbatches(data_size)
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        engine.forward_backward(_random_batches(config, device), num_microbatches=num_microbatches)
        engine.update(float(engine.compute_gradient_norm()))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    # The first step creates the optimizer state and the tables of rotary embeddings.
    return statistics.median(seconds[1:])


def _random_batches(config: RunConfig, device: torch.device) -> Iterator[Batch]:
    """Yield one batch of random tokens repeatedly. Equal tokens would change the time of the embedding."""
    from sas_megatron.planning.rank_estimate import synthetic_batch

    batch = synthetic_batch(config, device)
    for name in ("tokens", "labels"):
        batch[name].random_(config.model.vocab_size)
    return itertools.repeat(batch)
