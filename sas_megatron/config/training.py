"""The `training`, `evaluation`, `checkpoint` and `logging` sections."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.section import Section


class TrainingConfig(Section):
    """How long, with what batches, in what precision."""

    section_name: ClassVar[str] = "training"

    num_steps: int = Field(description="Optimizer steps of the whole run.")
    global_batch_size: int = Field(description="Samples of one optimizer step, over all ranks.")
    micro_batch_size: int = Field(description="B, samples of one forward pass on one rank.")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of weights and activations; gradients and optimizer stay in float32."
    )
    engine: Literal["megatron", "deepspeed"] = Field(
        default="megatron",
        description="What reduces gradients and updates weights: Megatron-core's DDP and optimizers, or "
        "DeepSpeed's ZeRO (section deepspeed).",
    )
    seed: int = Field(default=1234, description="Decides initial weights, sample order and dropout.")
    stop_after_steps: int | None = Field(
        default=None,
        description="Save and stop at this step although num_steps (and so the schedule) is longer.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activations that are computed again in the backward pass in place of being kept: those "
        "of recompute_modules, or all of a layer but its input.",
    )
    recompute_modules: list[Literal["attention", "simulation", "mlp"]] | None = Field(
        default=None,
        description="Under selective: attention (scores and weights), simulation (SAS: from the projected "
        "heads to query, key and value, their exchange included), mlp; null: all of the attention.",
    )
    recompute_layers: int | None = Field(
        default=None, description="Under full: only the first so many layers of each stage; null: all."
    )
    collective_timeout_minutes: float = Field(
        default=10.0, description="A collective that takes longer ends the run with an error."
    )

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        self.require_positive("num_steps", "global_batch_size", "micro_batch_size", "stop_after_steps")
        self.require_positive("collective_timeout_minutes", "recompute_layers")
        for field, mode in (("recompute_modules", "selective"), ("recompute_layers", "full")):
            if getattr(self, field) is not None and self.recompute != mode:
                raise self.problem(
                    field, f"belongs to training.recompute={mode} and to no other", "set both or neither"
                )
        if self.seed < 0:
            raise self.problem("seed", "must not be negative", "use 1234, for example")
        if self.global_batch_size % self.micro_batch_size:
            raise self.problem(
                "global_batch_size",
                f"must be a multiple of training.micro_batch_size={self.micro_batch_size}",
                f"use {-(-self.global_batch_size // self.micro_batch_size) * self.micro_batch_size}",
            )
        return self

    def num_microbatches(self, data_parallel: int) -> int:
        """Microbatches of a step on each of `data_parallel` ranks, whose number must fit the batch."""
        return self.global_batch_size // self.micro_batch_size // data_parallel


class EvaluationConfig(Section):
    """Held-out loss on the same fixed windows each time."""

    section_name: ClassVar[str] = "evaluation"

    interval: int | None = Field(
        default=None, description="Steps between evaluations; null: only at the end."
    )
    num_sequences: int = Field(
        default=64, description="Validation windows, drawn from the split the same for every seed."
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        self.require_positive("interval", "num_sequences")
        return self


class CheckpointConfig(Section):
    """When to save, and whether to go on from what is there."""

    section_name: ClassVar[str] = "checkpoint"

    interval: int | None = Field(default=None, description="Steps between saves; null: only at the end.")
    resume: bool = Field(
        default=False, description="Go on from the newest checkpoint of the run directory, if there is one."
    )
    initial_weights: str | None = Field(
        default=None,
        description="Folder of whole weights, as `sas-megatron checkpoint import` writes them, that training "
        "starts from; null: weights drawn from training.seed. A checkpoint that is gone on with comes first.",
    )

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        self.require_positive("interval")
        return self


class LoggingConfig(Section):
    """Where the run leaves its files, and how often it speaks."""

    section_name: ClassVar[str] = "logging"

    run_directory: str = Field(
        description="Holds config.yaml, run.json, metrics.jsonl, summary.json, checkpoints/."
    )
    interval: int = Field(
        default=10, description="Steps between logged ones; each is one line of metrics.jsonl."
    )
    tensorboard: bool = Field(default=True, description="Also write TensorBoard events.")
    wire_ledger: bool = Field(
        default=False,
        description="Count the bytes that each rank sends in collectives, by group, into summary.json.",
    )
    profile_steps: list[int] | None = Field(
        default=None,
        description="First and last step that every rank profiles, as profile/*.json.gz for Perfetto; "
        "these steps are slower. null: none.",
    )

    @model_validator(mode="after")
    def _check(self) -> LoggingConfig:
        self.require_positive("interval")
        steps = self.profile_steps
        if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise self.problem(
                "profile_steps",
                "must be two step numbers, counted from 1, the first not after the last",
                "use [10, 12] for three steps, or null for none",
            )
        return self
