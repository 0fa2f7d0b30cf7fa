"""The `training` and `checkpoint` sections."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from sas_megatron.config.errors import FieldError
from sas_megatron.config.section import Section, next_multiple

# numpy, which shuffles the samples of Megatron-core's data sets, accepts seeds of 32 bits.
NUM_SEEDS = 2**32
# A year. Timeouts are datetime.timedelta, and torch converts them to nanoseconds of 64 bits.
MAX_TIMEOUT_MINUTES = 365 * 24 * 60


# Spellings of other programs -> the data type.
PRECISIONS = {
    **dict.fromkeys(("float32", "fp32", "f32", "float", "single", "torch.float32", "32"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16", "torch.bfloat16"), "bfloat16"),
}
NOT_OFFERED_PRECISIONS = (
    "float16",
    "fp16",
    "f16",
    "half",
    "torch.float16",
    "16",
    "tf32",
    "float64",
    "fp64",
    "fp8",
)


def parse_precision(value: Any) -> Any:
    """Return the data type that a common spelling names; other values are left to the field's rule.

    Raises:
        FieldError: It names a data type that is not offered.
    """
    spelling = str(value).lower() if isinstance(value, str | int) else None
    if spelling in NOT_OFFERED_PRECISIONS:
        raise FieldError(
            "training.precision",
            value,
            "is not offered: weights and activations are float32 or bfloat16",
            "use bfloat16",
            fix=("training.precision=bfloat16",),
        )
    return PRECISIONS.get(str(spelling), value)


class TrainingConfig(Section):
    """Length, batch sizes, precision and engine of the training loop."""

    section_name: ClassVar[str] = "training"

    num_steps: int = Field(description="Number of optimizer steps of the run.")
    global_batch_size: int = Field(description="Samples per optimizer step, over all ranks.")
    micro_batch_size: int = Field(description="B, samples per forward pass on one rank.")
    precision: Annotated[Literal["float32", "bfloat16"], BeforeValidator(parse_precision)] = Field(
        default="float32",
        description="Data type of weights and activations; gradients and optimizer states are float32. Other "
        "spellings, such as bf16 and fp32, are accepted.",
    )
    deterministic: bool = Field(
        default=False,
        description="On GPUs, use only kernels that give bit-identical results when repeated. They are "
        "slower. A resumed run is then bit-identical to an uninterrupted one, as it always is on a CPU.",
    )
    engine: Literal["megatron", "deepspeed"] = Field(
        default="megatron",
        description="Engine that reduces gradients and updates weights: Megatron-core's DDP and optimizers, "
        "or DeepSpeed's ZeRO (section deepspeed).",
    )
    order_steps: int | None = Field(
        default=None,
        description="Number of steps for which the sample order is built; null: num_steps. Give runs of "
        "different length the num_steps of the longest one, so that they read the same samples in the same "
        "order.",
    )
    seed: int = Field(
        default=1234, description="Random seed of the initial weights, the sample order and dropout."
    )
    stop_after_steps: int | None = Field(
        default=None,
        description="Save a checkpoint and stop after this step; the schedule still spans num_steps.",
    )
    stop_after_seconds: float | None = Field(
        default=None,
        description="Save a checkpoint and stop at the end of the first step that finishes this many seconds "
        "or more after the session started; checkpoint.resume continues the run.",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Activation recomputation in the backward pass. selective: the activations of "
        "recompute_modules; full: all activations of a layer, of which only the input is stored.",
    )
    recompute_modules: list[Literal["attention", "simulation", "mlp"]] | None = Field(
        default=None,
        description="With recompute=selective: attention (scores and attention weights), simulation (SAS: "
        "from the projected heads to query, key and value, including their exchange), mlp. null: all modules "
        "of the attention layer.",
    )
    recompute_layers: int | None = Field(
        default=None,
        description="With recompute=full: recompute only this many layers, the first ones of each stage. "
        "null: all layers.",
    )
    collective_timeout_minutes: float = Field(
        default=10.0,
        description="The run ends with an error if a collective takes longer than this. The ranks wait for "
        "rank 0 to build sample indices without this limit.",
    )

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        self.require_positive("num_steps", "global_batch_size", "micro_batch_size", "stop_after_steps")
        self.require_positive("order_steps", "recompute_layers")
        self.require_positive("stop_after_seconds", "collective_timeout_minutes")
        self.require_at_most(
            MAX_TIMEOUT_MINUTES, "collective_timeout_minutes", reason="torch cannot represent long timeouts"
        )
        for field, mode in (("recompute_modules", "selective"), ("recompute_layers", "full")):
            if getattr(self, field) is not None and self.recompute != mode:
                raise self.problem(
                    field,
                    f"requires training.recompute={mode}",
                    f"remove it, or set training.recompute={mode}",
                    (f"training.recompute={mode}",),
                )
        if self.order_steps is not None and self.order_steps < self.num_steps:
            raise self.problem(
                "order_steps",
                f"must be at least training.num_steps={self.num_steps}",
                f"use {self.num_steps} or more, or leave it out",
                ("training.order_steps=null",),
            )
        if not 0 <= self.seed < NUM_SEEDS:
            raise self.problem("seed", f"must be at least 0 and below {NUM_SEEDS}", "use 1234, for example")
        if self.global_batch_size % self.micro_batch_size:
            multiple = next_multiple(self.global_batch_size, self.micro_batch_size)
            raise self.problem(
                "global_batch_size",
                f"must be a multiple of training.micro_batch_size={self.micro_batch_size}",
                f"use {multiple}",
                (f"training.global_batch_size={multiple}",),
            )
        return self

    @property
    def num_ordered_samples(self) -> int:
        """The number of samples for which the order is built, at least that of the run."""
        return (self.order_steps or self.num_steps) * self.global_batch_size

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of a weight or an activation."""
        return {"float32": 4, "bfloat16": 2}[self.precision]

    def num_microbatches(self, data_parallel: int) -> int:
        """Return the microbatches per step on each of `data_parallel` ranks, which must divide the batch."""
        return self.global_batch_size // self.micro_batch_size // data_parallel


def _refuse_numbers(value: Any) -> Any:
    """Return the value; 0 and 1, which Python counts as equal to false and true, are refused."""
    if isinstance(value, int) and not isinstance(value, bool):
        raise FieldError("checkpoint.resume", value, "is not one of the choices", "use true, false or auto")
    return value


class CheckpointConfig(Section):
    """When to save and remove checkpoints, and which weights a run starts from."""

    section_name: ClassVar[str] = "checkpoint"

    interval: int | None = Field(default=None, description="Steps between saves; null: only at the end.")
    at_steps: list[int] | None = Field(
        default=None,
        description="Additional steps after which to save. These checkpoints are never removed; other runs "
        "can branch off from them.",
    )
    resume: Annotated[Literal[True, False, "auto"], BeforeValidator(_refuse_numbers)] = Field(
        default=False,
        description="Resume from the newest undamaged checkpoint in the run directory, if one exists; the "
        "parallel layout may differ. auto (the default of the scripts in launch/): the same, without a "
        "report if there is none.",
    )
    keep_last: int | None = Field(
        default=None,
        description="Number of newest checkpoints to keep; older ones are removed. null: keep all.",
    )
    keep_every: int | None = Field(
        default=None,
        description="With keep_last: never remove a checkpoint whose step is a multiple of this number.",
    )
    asynchronous: bool = Field(
        default=False,
        description="Write checkpoints in the background while training continues, from a copy of each "
        "rank's shard in memory.",
    )
    initial_weights: str | None = Field(
        default=None,
        description="Weights that a new run starts from: a checkpoint or a run directory of the same model, "
        "of any layout or engine, or a folder written by `sas-megatron checkpoint import`. null: initialize "
        "from training.seed. A checkpoint that the run resumes from takes precedence.",
    )
    branch_from: str | None = Field(
        default=None,
        description="Checkpoint of another run, from which a new run continues: it takes over the weights, "
        "optimizer states, sample position, random states and metrics up to that step. The two runs may "
        "differ in length and in the learning rate decay after that step. A checkpoint that the run resumes "
        "from takes precedence.",
    )

    @model_validator(mode="after")
    def _check(self) -> CheckpointConfig:
        self.require_positive("interval", "keep_last", "keep_every")
        self.require_paths("initial_weights", "branch_from")
        if self.keep_every is not None and self.keep_last is None:
            raise self.problem(
                "keep_every",
                "has no effect with checkpoint.keep_last=null, which keeps all checkpoints",
                "set checkpoint.keep_last too, or leave it out",
                ("checkpoint.keep_every=null",),
            )
        if self.at_steps is not None and min(self.at_steps, default=1) < 1:
            raise self.problem(
                "at_steps", "must be step numbers, counted from 1", "use [100, 200], for example"
            )
        if self.branch_from is not None and self.initial_weights is not None:
            raise self.problem(
                "branch_from",
                "provides the weights, and checkpoint.initial_weights is also set",
                "remove one of them",
                ("checkpoint.initial_weights=null",),
            )
        return self

    def is_due(self, step: int) -> bool:
        """Return whether to save a checkpoint after this step."""
        return (self.interval is not None and step % self.interval == 0) or step in (self.at_steps or [])

    def is_permanent(self, step: int) -> bool:
        """Return whether the checkpoint of this step is kept regardless of `keep_last`."""
        return (self.keep_every is not None and step % self.keep_every == 0) or step in (self.at_steps or [])
