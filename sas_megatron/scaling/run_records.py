"""The records of a run's summary.json and metrics.jsonl that comparisons read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    # NaN is not valid JSON: a missing result is null or absent.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class CurvePoint(_Record):
    """One line of metrics.jsonl: the amounts spent up to a step, and the loss at that step."""

    step: int
    consumed_tokens: int
    training_flops: float
    elapsed_seconds: float
    loss: float | None = None


class TrainPoint(CurvePoint):
    """Loss of the batch of a step."""

    kind: Literal["train"]
    loss: float | None = Field(default=None, validation_alias="train_loss")


class ValidationPoint(CurvePoint):
    """Loss on the held-out windows after a step."""

    kind: Literal["validation"]
    loss: float | None = Field(default=None, validation_alias="validation_loss")


class HealthEvent(_Record):
    """A problem of a step that the health checks found; not a point of a curve."""

    kind: Literal["health"]
    step: int


class Probe(_Record):
    """Measurements by layer after a step, of its update or of the probe batch; not a point of a curve."""

    kind: Literal["update", "probe"]
    step: int
    layers: list[dict[str, Any]]


class HealthCounts(_Record):
    """Counts of summary.json: steps whose update was skipped."""

    skipped_steps: int


class SetLoss(_Record):
    """Loss of a named validation set (`evaluation.sets`); None if it is not finite."""

    loss: float | None
    num_tokens: int


class RunSummary(_Record):
    """The contents of summary.json; None for a result that the run does not have."""

    exit_reason: str
    steps: int
    tokens: int
    # None in summaries of schema 2 and earlier.
    epochs: float | None = None
    training_flops: float | None = None
    training_flops_per_token: dict[str, float] | None = None
    parameters: dict[str, int] | None = None
    training_seconds: float | None = None
    total_seconds: float | None = None
    median_step_seconds: float | None = None
    peak_memory_bytes: int | None = None
    final_train_loss: float | None = None
    final_validation_loss: float | None = None
    best_validation_loss: float | None = None
    validation_perplexity: float | None = None
    validation_bits_per_byte: float | None = None
    # None without named validation sets.
    validation_sets: dict[str, SetLoss] | None = None
    world_size: int | None = None
    health: HealthCounts | None = None
