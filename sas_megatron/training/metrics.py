"""Counts and rates of a run: cumulative progress, throughput, and model FLOPs utilization (MFU)."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from sas_megatron.checkpoint.manifest import DAMAGE_REMEDY, PROGRESS, DamagedCheckpoint
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.io.file_records import describe_read_error
from sas_megatron.training.health import HealthHistory


@dataclass
class Progress:
    """Cumulative counts. They are saved with checkpoints, so that a resumed run continues them."""

    step: int = 0
    consumed_samples: int = 0
    # Time in training steps, without start-up, evaluation and saving.
    training_seconds: float = 0.0
    best_validation_loss: float | None = None
    # Whether an evaluation was due at the step at which the run was stopped, and was left to the resumed run.
    owes_evaluation: bool = False
    step_seconds: list[float] = field(default_factory=list)
    health: HealthHistory = field(default_factory=HealthHistory)

    def count_step(self, samples: int, seconds: float) -> None:
        """Add one finished step."""
        self.step += 1
        self.consumed_samples += samples
        self.training_seconds += seconds
        self.step_seconds.append(seconds)

    def count_evaluation(self, loss: float) -> None:
        """Add one evaluation; a loss that is not finite is never the best one."""
        self.owes_evaluation = False
        if math.isfinite(loss):
            best = self.best_validation_loss
            self.best_validation_loss = loss if best is None else min(best, loss)

    def median_step_seconds(self) -> float | None:
        """Return the median over all steps except the first, which warms up; None before any step."""
        timed = self.step_seconds[1:] or self.step_seconds
        return statistics.median(timed) if timed else None


_PROGRESS_TYPE = TypeAdapter(Progress)


def read_counts(counts: dict[str, Any], *, checkpoint: Path) -> Progress:
    """Return the progress whose fields a checkpoint contains.

    Raises:
        DamagedCheckpoint: A field has another type.
    """
    try:
        return _PROGRESS_TYPE.validate_json(json.dumps(counts), strict=True)
    except ValueError as error:
        problem = f"is damaged: {PROGRESS}: counts.{describe_read_error(error)}"
        raise DamagedCheckpoint(checkpoint, problem, DAMAGE_REMEDY) from None


class Throughput:
    """Converts samples and seconds into tokens, model FLOPs and rates.

    Model FLOPs follow the conventions of `costs.flops`: the full attention matrix is counted, not its
    causal half, and recomputation is not counted.

    Args:
        config: The run.
        world_size: Number of ranks.
        peak_flops: Peak FLOP/s of one rank's device, for the MFU; None if unknown.
    """

    def __init__(self, config: RunConfig, *, world_size: int, peak_flops: float | None = None) -> None:
        self.sequence_length = config.data.sequence_length
        self.flops_per_token = sum(count_training_flops(config).values())
        self.world_size = world_size
        self.peak_flops = peak_flops

    def position(self, progress: Progress) -> dict[str, Any]:
        """Return the run's position on every axis against which a loss can be plotted."""
        tokens = progress.consumed_samples * self.sequence_length
        return {
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": tokens,
            "training_flops": tokens * self.flops_per_token,
            "elapsed_seconds": progress.training_seconds,
        }

    def tokens_per_second(self, samples: int, seconds: float) -> float:
        """Return the tokens per second of a step, summed over all ranks."""
        return samples * self.sequence_length / seconds

    def teraflops_per_rank(self, samples: int, seconds: float) -> float:
        """Return the model FLOPs per second and rank, in units of 10¹²."""
        return self.tokens_per_second(samples, seconds) * self.flops_per_token / self.world_size / 1e12

    def utilization(self, samples: int, seconds: float) -> float | None:
        """Return the MFU, a share of `peak_flops`; None if the peak is unknown."""
        if self.peak_flops is None:
            return None
        return 1e12 * self.teraflops_per_rank(samples, seconds) / self.peak_flops
