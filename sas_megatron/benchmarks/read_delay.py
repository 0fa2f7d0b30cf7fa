"""The time of a step if reads of samples are slow: hidden, as long as reading takes less time than the step.

Two readers of the same samples take turns, one of which waits before it returns a sample. In its first steps
a reader still has batches that its thread read during the other's turn, so these steps are not counted.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

from sas_megatron.benchmarks.timing import median_ratio
from sas_megatron.config.run import RunConfig
from sas_megatron.data.read_ahead import MICROBATCHES_AHEAD
from sas_megatron.distributed.topology import Topology
from sas_megatron.training.build import build_engine
from sas_megatron.training.engine import Engine
from sas_megatron.training.run_data import RunData
from sas_megatron.training.step import train_step

WARM_UP_ROUNDS = 1
# Steps of a turn that are timed.
TIMED_STEPS = 3


class _SlowSamples:
    """Samples of which each read takes longer."""

    def __init__(self, samples: Any, seconds: float) -> None:
        self._samples = samples
        self._seconds = seconds

    def __getitem__(self, index: int) -> Any:
        time.sleep(self._seconds)
        return self._samples[index]


class _Reader(RunData):
    """The training samples, with `seconds` added to each read."""

    def __init__(self, config: RunConfig, topology: Topology, *, seconds: float) -> None:
        super().__init__(config, topology)
        if seconds:
            slow: Any = _SlowSamples(self._training_samples, seconds)
            self._training_samples = slow
        self.num_taken_steps = 0


def count_steps(config: RunConfig, *, rounds: int) -> int:
    """Return the steps of each reader in a measurement of `rounds` rounds."""
    return (WARM_UP_ROUNDS + rounds) * (_count_settling_steps(config) + TIMED_STEPS)


def _count_settling_steps(config: RunConfig) -> int:
    """Return the steps until a reader has used the batches that were ready before its turn."""
    # With one replica; more replicas have fewer microbatches each, but all of them are in one process here.
    microbatches = config.training.num_microbatches(1)
    return math.ceil((MICROBATCHES_AHEAD + 1) / microbatches) + 1


def measure_read_delay(
    config: RunConfig, topology: Topology, *, seconds: float, rounds: int
) -> dict[str, Any]:
    """Time steps with and without `seconds` added to each read of a sample.

    Args:
        config: A run on prepared data of at least `count_steps` steps.
        topology: The process groups, of one rank.
        seconds: Time that is added to each read.
        rounds: Rounds after the warm-up round; in each, both readers have a turn.

    Returns:
        Medians over the rounds of the seconds of a step, and of the ratio within a round.
    """
    engine = build_engine(config)
    readers = {
        name: _Reader(config, topology, seconds=delay)
        for name, delay in (("plain", 0.0), ("delayed", seconds))
    }
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(WARM_UP_ROUNDS + rounds):
        for name, reader in readers.items():
            for _ in range(_count_settling_steps(config)):
                _take_step(engine, reader, config, topology)
            taken = [_take_step(engine, reader, config, topology) for _ in range(TIMED_STEPS)]
            times[name].append(statistics.mean(taken))
    plain, delayed = (times[name][WARM_UP_ROUNDS:] for name in ("plain", "delayed"))
    return {
        "delay_seconds": seconds,
        "samples_per_step": config.training.global_batch_size,
        "plain_seconds": statistics.median(plain),
        "delayed_seconds": statistics.median(delayed),
        "ratio": median_ratio(delayed, plain),
        "rounds": rounds,
    }


def _take_step(engine: Engine, reader: _Reader, config: RunConfig, topology: Topology) -> float:
    """Run one optimizer step, which ends with a read of the loss; return its seconds."""
    num_samples = config.training.global_batch_size
    start = time.perf_counter()
    train_step(
        engine,
        reader.training_batches(reader.num_taken_steps * num_samples),
        num_microbatches=reader.num_microbatches(num_samples),
        topology=topology,
    )
    reader.num_taken_steps += 1
    return time.perf_counter() - start
