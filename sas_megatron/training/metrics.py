"""The numbers of a run as it goes: what is counted, what is timed, and the lines they make."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import count_training_flops
from sas_megatron.training.health import HealthHistory


@dataclass
class Progress:
    """Cumulative counts; saved with checkpoints, so that a resumed run goes on counting."""

    step: int = 0
    consumed_samples: int = 0
    # Seconds in training steps: start-up, evaluation and saving are left out.
    training_seconds: float = 0.0
    best_validation_loss: float | None = None
    # An evaluation that was due when the run was stopped, which had no time for it.
    owes_evaluation: bool = False
    step_seconds: list[float] = field(default_factory=list)
    health: HealthHistory = field(default_factory=HealthHistory)

    def __post_init__(self) -> None:
        if isinstance(self.health, dict):  # as a checkpoint has it
            self.health = HealthHistory(**self.health)

    def count_step(self, samples: int, seconds: float) -> None:
        """Adds one finished step."""
        self.step += 1
        self.consumed_samples += samples
        self.training_seconds += seconds
        self.step_seconds.append(seconds)

    def median_step_seconds(self) -> float | None:
        """Median over the steps but the first, which warms up; None before any."""
        timed = self.step_seconds[1:] or self.step_seconds
        return statistics.median(timed) if timed else None


class Meter:
    """Turns progress into records for `metrics.jsonl`."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        self.sequence_length = config.data.sequence_length
        self.flops_per_token = sum(count_training_flops(config).values())
        self.world_size = world_size

    def position(self, progress: Progress) -> dict[str, Any]:
        """Where the run stands: on every axis that a loss can be read against."""
        tokens = progress.consumed_samples * self.sequence_length
        return {
            "step": progress.step,
            "consumed_samples": progress.consumed_samples,
            "consumed_tokens": tokens,
            "training_flops": tokens * self.flops_per_token,
            "elapsed_seconds": progress.training_seconds,
        }

    def tokens_per_second(self, samples: int, seconds: float) -> float:
        """Tokens of a step over its time, all ranks together."""
        return samples * self.sequence_length / seconds

    def teraflops_per_rank(self, samples: int, seconds: float) -> float:
        """Model FLOPs (conventions of `costs.flops`) per second and rank, in 10¹²."""
        return self.tokens_per_second(samples, seconds) * self.flops_per_token / self.world_size / 1e12
