"""The config of a run: all sections, and the rules that involve several of them."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from sas_megatron.config.attention import AttentionConfig, parse_attention
from sas_megatron.config.cudnn import check_cudnn
from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError, WorldSizeError
from sas_megatron.config.evaluation import EvaluationConfig
from sas_megatron.config.head_layout import check_context_parallel, check_tensor_parallel
from sas_megatron.config.model import ModelConfig
from sas_megatron.config.monitoring import HealthConfig, LoggingConfig
from sas_megatron.config.optimizer import DeepSpeedConfig, OptimizerConfig, ScheduleConfig
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.section import divisors, next_multiple
from sas_megatron.config.training import CheckpointConfig, TrainingConfig


class RunConfig(BaseModel):
    """All settings of a run; equal configs on equal layouts give equal runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: ModelConfig
    attention: Annotated[SerializeAsAny[AttentionConfig], BeforeValidator(parse_attention)]
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    training: TrainingConfig
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)
    logging: LoggingConfig

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_tensor_parallel(self.attention, self.parallel.tensor)
        check_context_parallel(self.attention, self.parallel.tensor, self.parallel.context)
        check_cudnn(self.attention, self.training)
        self._check_model()
        self.parallel.check_layers(self.model.num_layers)
        self._check_divisibility()
        if self.parallel.overlap_parameter_gather and not self.optimizer.distributed:
            raise self.parallel.problem(
                "overlap_parameter_gather",
                "requires the distributed optimizer, and optimizer.distributed=false",
                "set optimizer.distributed=true, or leave it out",
                ("optimizer.distributed=true",),
            )
        self._check_recompute()
        self._check_engine()
        self._check_steps()
        return self

    def _check_model(self) -> None:
        """Check the fields of model and attention that depend on each other."""
        if self.attention.qkv_bias and self.model.linear_bias:
            raise self.attention.problem(
                "qkv_bias",
                "has no effect with model.linear_bias=true, which adds these biases and those of all other "
                "projections",
                "set attention.qkv_bias=false",
            )
        if self.model.rotary_scaling != "none" and not self.attention.uses_model_rotary:
            raise self.model.problem(
                "rotary_scaling",
                f"is not supported by attention.kind={self.attention.kind}, which has its own rotary "
                "embedding",
                "set model.rotary_scaling=none and omit its other fields, or use another kind",
            )

    def _check_divisibility(self) -> None:
        """Check that sequence, MLP and embedding table can be sharded over the ranks."""
        tensor, context = self.parallel.tensor, self.parallel.context
        # Megatron-core gives each context rank two chunks of the sequence, one early and one late.
        chunks = 2 * context if context > 1 else 1
        if self.data.sequence_length % chunks:
            raise self.data.problem(
                "sequence_length",
                f"must be divisible by {chunks}, twice parallel.context={context}",
                f"use a multiple of {chunks}",
                (f"data.sequence_length={next_multiple(self.data.sequence_length, chunks)}",),
            )
        if self.model.ffn_hidden_size % tensor:
            raise self.model.problem(
                "ffn_hidden_size",
                f"must be divisible by parallel.tensor={tensor}",
                f"use a multiple of {tensor}",
                (f"model.ffn_hidden_size={next_multiple(self.model.ffn_hidden_size, tensor)}",),
            )
        if self.model.padded_vocab_size % tensor:
            raise self.model.problem(
                "vocab_multiple",
                f"must be divisible by parallel.tensor={tensor}",
                f"use a multiple of {tensor}",
                (f"model.vocab_multiple={next_multiple(self.model.vocab_multiple, tensor)}",),
            )
        if self.parallel.sequence and self.data.sequence_length % (tensor * context):
            raise self.data.problem(
                "sequence_length",
                f"must be divisible by {self.parallel.describe_sequence_ranks()} under sequence parallelism",
                f"use a multiple of {math.lcm(chunks, tensor * context)}, or set parallel.sequence=false",
                ("parallel.sequence=false",),
            )

    def _check_steps(self) -> None:
        """Check that schedule and profile fit into the number of steps."""
        warmup, steps = self.schedule.warmup_steps, self.training.num_steps
        if self.logging.profile_steps is not None and self.logging.profile_steps[0] > steps:
            raise self.logging.problem(
                "profile_steps",
                f"begins after training.num_steps={steps}",
                "use steps of the run",
                ("logging.profile_steps=null",),
            )
        if warmup >= steps:
            raise self.schedule.problem(
                "warmup_steps",
                f"must be below training.num_steps={steps}",
                "shorten it or train longer",
                (f"schedule.warmup_steps={steps // 10}",),
            )
        if warmup + (self.schedule.decay_steps or 0) > steps:
            raise self.schedule.problem(
                "decay_steps",
                f"must not exceed the {steps - warmup} of training.num_steps={steps} that remain after "
                f"schedule.warmup_steps={warmup}",
                "shorten one of them or train longer",
                (f"schedule.decay_steps={steps - warmup}",),
            )

    def _check_recompute(self) -> None:
        """Check that the modules and layers to recompute exist."""
        recomputable = [*self.attention.recomputable, "mlp"]
        for name in self.training.recompute_modules or []:
            if name not in recomputable:
                raise self.training.problem(
                    "recompute_modules",
                    f"attention.kind={self.attention.kind} cannot recompute {name}",
                    f"use some of {recomputable}",
                    ("training.recompute_modules=null",),
                )
        stages = self.parallel.layers_of_stages(self.model.num_layers)
        chunks = [layers // self.parallel.virtual_pipeline for layers in stages]
        if (self.training.recompute_layers or 0) > min(chunks):
            raise self.training.problem(
                "recompute_layers",
                f"must not exceed the smallest model chunk, which has {min(chunks)} layers",
                f"use at most {min(chunks)}, or leave it out to recompute all layers",
                (f"training.recompute_layers={min(chunks)}",),
            )

    def _check_engine(self) -> None:
        """Check that the engine supports the other settings."""
        if self.training.engine == "megatron":
            if self.deepspeed != DeepSpeedConfig():
                raise self.training.problem(
                    "engine",
                    "does not use the section deepspeed, which is set",
                    "set training.engine=deepspeed, or remove the section",
                    ("training.engine=deepspeed",),
                )
            return
        if self.parallel.pipeline > 1:
            raise self.parallel.problem(
                "pipeline",
                "requires Megatron-core's pipeline schedules, which training.engine=deepspeed does not use",
                "set training.engine=megatron, or parallel.pipeline=1",
                ("training.engine=megatron",),
            )
        for section, field, alternative in (
            (self.optimizer, "distributed", "deepspeed.zero_stage=1"),
            (self.parallel, "overlap_gradient_reduce", "deepspeed.settings.zero_optimization.overlap_comm"),
        ):
            if getattr(section, field):
                raise section.problem(
                    field,
                    "requires Megatron-core's engine, and training.engine=deepspeed",
                    f"use {alternative}, or set training.engine=megatron",
                    (f"{section.section_name}.{field}=false",),
                )
        if self.health.replica_check_interval is not None and self.deepspeed.zero_stage == 3:
            raise self.health.problem(
                "replica_check_interval",
                "requires replicated weights, and deepspeed.zero_stage=3 shards them over the data-parallel "
                "ranks",
                "leave it out, or use stage 0, 1 or 2",
                ("health.replica_check_interval=null",),
            )
        if self.training.precision == "bfloat16" and self.deepspeed.zero_stage == 0:
            # Seen with DeepSpeed 0.19.8: the gradient norm counts one tensor rank, and Adam's step count is
            # off by one.
            raise self.deepspeed.problem(
                "zero_stage",
                "DeepSpeed clips gradients and updates weights incorrectly in bfloat16 at stage 0",
                "use 1, 2 or 3, or training.precision=float32, or training.engine=megatron",
                ("deepspeed.zero_stage=1",),
            )

    @property
    def recomputed_modules(self) -> list[str]:
        """The modules recomputed under selective recomputation, `attention.recomputable` by default."""
        if self.training.recompute != "selective":
            return []
        return list(self.training.recompute_modules or self.attention.recomputable)

    def replaced(self, changes: dict[str, Any]) -> RunConfig:
        """Return a copy of the config with other values, checked against all rules.

        Args:
            changes: Values by `section.field`.

        Raises:
            UserError: The values break a rule.
        """
        sections = {name: getattr(self, name) for name in RunConfig.model_fields}
        by_section: dict[str, dict[str, Any]] = {}
        for path, value in changes.items():
            section, _, field = path.partition(".")
            if section not in sections:
                raise FieldError(path, value, "is no field of a section", f"use one of {', '.join(sections)}")
            by_section.setdefault(section, {})[field] = value
        for name, values in by_section.items():
            explicit = sections[name].model_dump(exclude_unset=True)
            try:
                sections[name] = type(sections[name]).model_validate(explicit | values)
            except ValidationError as error:
                problem = error.errors()[0]
                field = ".".join(map(str, (name, *problem["loc"])))
                rule = problem["msg"].lower()
                raise FieldError(field, problem["input"], rule, "correct it, or remove it") from None
        return RunConfig(**sections)

    def check_world_size(self, world_size: int) -> int:
        """Return the data-parallel degree on `world_size` ranks.

        Raises:
            FieldError: The layout or the batch sizes do not fit; the message names world sizes that do.
        """
        model_size = self.parallel.model_size
        samples, micro = self.training.global_batch_size, self.training.micro_batch_size
        fitting = [model_size * degree for degree in divisors(samples // micro)]
        nearest = max([size for size in fitting if size <= world_size], default=fitting[0])
        if world_size % model_size:
            raise WorldSizeError(
                "world size",
                world_size,
                f"must be a multiple of {model_size}, the ranks of one model "
                f"({self.parallel.describe_model_ranks()})",
                f"start {' or '.join(map(str, fitting[:4]))} processes "
                f"(launch/torchrun.sh {fitting[0]} CONFIG), or change the parallel degrees",
                nearest,
            )
        data_parallel = world_size // model_size
        if samples % (micro * data_parallel):
            raise WorldSizeError(
                "training.global_batch_size",
                samples,
                f"must be a multiple of micro_batch_size × data-parallel ranks = {micro} × {data_parallel}",
                f"start {' or '.join(map(str, fitting[:4]))} processes, or change the batch sizes",
                nearest,
            )
        self.parallel.check_microbatches(self.training.num_microbatches(data_parallel))
        return data_parallel
