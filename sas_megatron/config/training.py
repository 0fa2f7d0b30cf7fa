"""The `training`, `evaluation`, `checkpoint` and `logging` sections."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import AliasChoices, Field, model_validator

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
    order_steps: int | None = Field(
        default=None,
        description="Steps that the order of samples is laid out for; null: num_steps. Runs of different "
        "length that are to take the same samples in the same order name the longest's.",
    )
    seed: int = Field(default=1234, description="Decides initial weights, sample order and dropout.")
    stop_after_steps: int | None = Field(
        default=None,
        description="Save and stop at this step although num_steps (and so the schedule) is longer.",
    )
    stop_after_seconds: float | None = Field(
        default=None,
        description="Save and stop at the end of the first step that is finished so long after this session "
        "started, to be gone on with by checkpoint.resume.",
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
        self.require_positive("order_steps", "recompute_layers")
        self.require_positive("stop_after_seconds", "collective_timeout_minutes")
        for field, mode in (("recompute_modules", "selective"), ("recompute_layers", "full")):
            if getattr(self, field) is not None and self.recompute != mode:
                raise self.problem(
                    field, f"belongs to training.recompute={mode} and to no other", "set both or neither"
                )
        if self.order_steps is not None and self.order_steps < self.num_steps:
            raise self.problem(
                "order_steps",
                f"is too short for training.num_steps={self.num_steps}",
                f"use {self.num_steps} or more, or leave it out",
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

    @property
    def num_ordered_samples(self) -> int:
        """Samples that the order is laid out for: at least those of the run."""
        return (self.order_steps or self.num_steps) * self.global_batch_size

    @property
    def element_bytes(self) -> int:
        """Of one number of a weight or an activation."""
        return {"float32": 4, "bfloat16": 2}[self.precision]

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
    at_steps: list[int] | None = Field(
        default=None, description="Steps after which to save, too, for good; for runs that branch off there."
    )
    resume: bool = Field(
        default=False,
        description="Go on from the newest undamaged checkpoint of the run directory, if there is one; the "
        "layout may be another.",
    )
    keep_last: int | None = Field(
        default=None, description="Checkpoints to keep, the newest ones; older are removed. null: all."
    )
    keep_every: int | None = Field(
        default=None,
        description="With keep_last: those whose step is a multiple of this are kept for good, too.",
    )
    asynchronous: bool = Field(
        default=False,
        description="Write in the background, from a copy in memory of what each rank writes, while training "
        "goes on.",
    )
    initial_weights: str | None = Field(
        default=None,
        description="What a new run begins with: a checkpoint or a run of the same model, of any layout or "
        "engine, or what `sas-megatron checkpoint import` wrote; null: weights drawn from training.seed. A "
        "checkpoint that is gone on with comes first.",
    )
    branch_from: str | None = Field(
        default=None,
        description="A checkpoint of another run, whose steps until then a new run takes for its own: "
        "weights, optimizer, samples, random states and metrics. The two may differ in how long they are and "
        "in how the learning rate falls afterwards. A checkpoint that is gone on with comes first.",
    )

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        self.require_positive("interval", "keep_last", "keep_every")
        if self.keep_every is not None and self.keep_last is None:
            raise self.problem(
                "keep_every",
                "says what to keep beside the newest, and checkpoint.keep_last=null keeps all",
                "set checkpoint.keep_last too, or leave it out",
            )
        if self.at_steps is not None and min(self.at_steps, default=1) < 1:
            raise self.problem("at_steps", "must be numbers of steps, counted from 1", "use [100, 200], say")
        if self.branch_from is not None and self.initial_weights is not None:
            raise self.problem(
                "branch_from", "brings its weights, and checkpoint.initial_weights is set", "leave one out"
            )
        return self

    def is_due(self, step: int) -> bool:
        """Whether to save after so many steps."""
        return (self.interval is not None and step % self.interval == 0) or step in (self.at_steps or [])

    def is_permanent(self, step: int) -> bool:
        """Whether the checkpoint of this step stays when older ones than `keep_last` go."""
        return (self.keep_every is not None and step % self.keep_every == 0) or step in (self.at_steps or [])


class HealthConfig(Section):
    """Steps that would do harm, copies of weights that drift apart, ranks that hold up the others."""

    section_name: ClassVar[str] = "health"

    skipped_in_a_row: int = Field(
        default=3,
        description="Steps in a row that may be skipped, for a loss or gradients that are not finite or for "
        "a spike: their samples are used up, and weights, optimizer and schedule stay as they are. One more "
        "ends the run; with 0 the first does.",
    )
    spike_response: Literal["record", "skip", "stop"] = Field(
        default="record",
        description="On a loss or gradient norm far above those before: note it, skip the step too, or end "
        "the run before the update.",
    )
    spike_threshold: float = Field(
        default=10.0,
        description="How many deviations above the median a spike is: 1.4826 × the median absolute "
        "deviation, but 1% of the median at least.",
    )
    spike_window: int = Field(
        default=64, description="Updates before the step that it is held against; before that many, nothing."
    )
    replica_check_interval: int | None = Field(
        default=None,
        description="Steps between checks that weights of which several ranks hold copies are equal on them, "
        "bit for bit; where they are not, the run ends. null: never.",
    )
    straggler_interval: int | None = Field(
        default=None,
        description="Steps between those in which each rank measures its own time, without its waiting for "
        "others. null: none.",
    )
    straggler_excess: float = Field(
        default=0.2,
        description="A rank is named whose own time exceeds the median of its pipeline stage by this share.",
    )

    @model_validator(mode="after")
    def _check(self) -> HealthConfig:
        self.require_between(0, float("inf"), "skipped_in_a_row")
        self.require_positive("spike_threshold", "replica_check_interval", "straggler_interval")
        self.require_positive("straggler_excess")
        if self.spike_window < 3:
            raise self.problem("spike_window", "must be 3 or more to have a median and a spread", "use 64")
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
    communication_counter: bool = Field(
        default=False,
        # The second name is the one in configs written before it was renamed.
        validation_alias=AliasChoices("communication_counter", "wire_ledger"),
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
