"""Seconds of whole optimizer steps of several runs on this machine, in turn, so that drift hits all alike."""

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
    """By round, the median step of each config, on as many processes as one model takes.

    A round builds each model anew, and no more than one is held; tokens are random.

    Args:
        configs: runs of one layout.
        rounds: how often each is measured.
    """
    world_size = configs[0].parallel.model_size
    threads = max(1, (os.cpu_count() or 1) // world_size)
    by_rank = run_on_ranks(_time_on_rank, configs, rounds, world_size=world_size, threads=threads)
    # A step ends when its slowest rank does.
    return [[max(seconds) for seconds in zip(*ranks, strict=True)] for ranks in zip(*by_rank, strict=True)]


def _time_on_rank(configs: list[RunConfig], rounds: int) -> list[list[float]]:
    """On a rank of a joined world."""
    from sas_megatron.distributed.topology import joined_groups

    with joined_groups(configs[0].parallel, device=prepare_device(), seed=1) as topology:
        return time_rounds(configs, rounds, topology)


def time_rounds(configs: list[RunConfig], rounds: int, topology: Topology) -> list[list[float]]:
    """By round, this rank's median step of each config."""
    return [
        [_time_steps(config, topology.data_size, topology.device) for config in configs]
        for _ in range(rounds)
    ]


def _time_steps(config: RunConfig, data_size: int, device: torch.device) -> float:
    from sas_megatron.training import build

    # An engine refers to itself in circles: the one before keeps its memory until Python looks for those.
    gc.collect()
    torch.cuda.empty_cache()
    engine = build.build_engine(config)
    num_microbatches = config.training.num_microbatches(data_size)
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        engine.forward_backward(_random_batches(config, device), num_microbatches=num_microbatches)
        engine.update(engine.compute_gradient_norm())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    # The first step makes the optimizer's states and the tables of positions.
    return statistics.median(seconds[1:])


def _random_batches(config: RunConfig, device: torch.device) -> Iterator[Batch]:
    """The same random tokens again and again: gradients of one table row alone would take another time."""
    from sas_megatron.planning.rank_estimate import synthetic_batch

    batch = synthetic_batch(config, device)
    for name in ("tokens", "labels"):
        batch[name].random_(config.model.vocab_size)
    return itertools.repeat(batch)
