"""Time complete optimizer steps of several runs on this machine, in alternation."""

from __future__ import annotations

import functools
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from sas_megatron.config.run import RunConfig
from sas_megatron.model.language_loss import Batch
from sas_megatron.planning.rank_processes import run_on_ranks
from sas_megatron.platform.device import prepare_device

if TYPE_CHECKING:
    from sas_megatron.distributed.topology import Topology

TIMED_STEPS = 3


def measure_step_seconds(
    configs: list[RunConfig], *, rounds: int, with_transformers: bool = False
) -> list[list[float]]:
    """Measure the steps of each config, on the number of processes that one model replica needs.

    Each round builds the model of each config again, one at a time. The tokens are random.

    Args:
        configs: Runs with the same layout.
        rounds: Number of measurements of each config.
        with_transformers: Whether to time the model of transformers with the first config's parameters, too.

    Returns:
        The median seconds of a step by round and config; those of transformers are the last of a round.
    """
    world_size = configs[0].parallel.model_size
    threads = max(1, (os.cpu_count() or 1) // world_size)
    by_rank = run_on_ranks(
        _time_on_rank, configs, rounds, with_transformers, world_size=world_size, threads=threads
    )
    # A step ends when its slowest rank has finished.
    return [[max(seconds) for seconds in zip(*ranks, strict=True)] for ranks in zip(*by_rank, strict=True)]


def _time_on_rank(configs: list[RunConfig], rounds: int, with_transformers: bool) -> list[list[float]]:
    """Measure on a rank of an initialized world."""
    from sas_megatron.distributed.topology import joined_groups

    with joined_groups(configs[0].parallel, device=prepare_device(), seed=1) as topology:
        return time_rounds(configs, rounds, topology, with_transformers=with_transformers)


def time_rounds(
    configs: list[RunConfig], rounds: int, topology: Topology, *, with_transformers: bool = False
) -> list[list[float]]:
    """Return this rank's median seconds of a step by round and config, as `measure_step_seconds` does."""
    steps = [functools.partial(_prepare_engine, config) for config in configs]
    if with_transformers:
        steps.append(functools.partial(_prepare_transformers, configs[0]))
    return [[_time_steps(prepare, topology) for prepare in steps] for _ in range(rounds)]


def _prepare_engine(config: RunConfig, topology: Topology) -> Callable[[], None]:
    """Build the engine of a run, and return its optimizer step."""
    from sas_megatron.training import build

    engine = build.build_engine(config)
    num_microbatches = config.training.num_microbatches(topology.data_size)
    batches = _random_batches(config, topology.device)

    def take_step() -> None:
        engine.forward_backward(batches, num_microbatches=num_microbatches)
        engine.update(float(engine.compute_gradient_norm()))

    return take_step


def _prepare_transformers(config: RunConfig, topology: Topology) -> Callable[[], None]:
    """Build the model of transformers with the run's parameters, and return its optimizer step."""
    from sas_megatron.benchmarks.transformers_step import TransformersStep

    trained = TransformersStep(config, topology.device)
    num_microbatches = config.training.num_microbatches(topology.data_size)
    batch = next(_random_batches(config, topology.device))
    return lambda: trained.run(batch, num_microbatches=num_microbatches)


def _time_steps(prepare: Callable[[Topology], Callable[[], None]], topology: Topology) -> float:
    """Return the median seconds of the step that `prepare` returns."""
    # The previous engine is part of reference cycles, so its memory is freed only by a garbage collection.
    gc.collect()
    torch.cuda.empty_cache()
    step = prepare(topology)
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
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
