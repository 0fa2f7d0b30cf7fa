"""A whole run: all sections together, and the rules that cross them."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from sas_megatron.config.attention import AttentionConfig, parse_attention
from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.model import ModelConfig
from sas_megatron.config.optimizer import DeepSpeedConfig, OptimizerConfig, ScheduleConfig
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    HealthConfig,
    LoggingConfig,
    TrainingConfig,
)


class RunConfig(BaseModel):
    """Everything that decides a run; equal configs on equal layouts give equal runs."""

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
        tensor = self.parallel.tensor
        context = self.parallel.context
        self.attention.check_tensor_parallel(tensor)
        self.attention.check_context_parallel(tensor, context)
        if self.attention.backend == "cudnn" and self.training.precision != "bfloat16":
            raise self.attention.problem(
                "backend",
                f"does not compute in training.precision={self.training.precision}",
                "use auto, or training.precision=bfloat16",
            )
        self.parallel.check_layers(self.model.num_layers)
        # Megatron-core gives each context rank two chunks of the sequence, one early and one late.
        chunks = 2 * context if context > 1 else 1
        if self.data.sequence_length % chunks:
            raise self.data.problem(
                "sequence_length",
                f"must be divisible by {chunks}, twice parallel.context={context}",
                f"use a multiple of {chunks}",
            )
        if self.model.ffn_hidden_size % tensor:
            raise self.model.problem(
                "ffn_hidden_size",
                f"must be divisible by parallel.tensor={tensor}",
                f"use a multiple of {tensor}",
            )
        if self.model.padded_vocab_size % tensor:
            raise self.model.problem(
                "vocab_multiple",
                f"must be divisible by parallel.tensor={tensor}",
                f"use a multiple of {tensor}",
            )
        if self.parallel.sequence and self.data.sequence_length % (tensor * context):
            raise self.data.problem(
                "sequence_length",
                f"must be divisible by {self.parallel.describe_sequence_ranks()} under sequence parallelism",
                f"use a multiple of {math.lcm(chunks, tensor * context)}, or set parallel.sequence=false",
            )
        if self.parallel.overlap_parameter_gather and not self.optimizer.distributed:
            raise self.parallel.problem(
                "overlap_parameter_gather",
                "concerns the distributed optimizer, and optimizer.distributed=false",
                "set optimizer.distributed=true, or leave it out",
            )
        self._check_recompute()
        self._check_engine()
        warmup, steps = self.schedule.warmup_steps, self.training.num_steps
        if self.logging.profile_steps is not None and self.logging.profile_steps[0] > steps:
            raise self.logging.problem(
                "profile_steps", f"begins after training.num_steps={steps}", "use steps of the run"
            )
        if warmup >= steps:
            raise self.schedule.problem(
                "warmup_steps", f"must be below training.num_steps={steps}", "shorten it or train longer"
            )
        if warmup + (self.schedule.decay_steps or 0) > steps:
            raise self.schedule.problem(
                "decay_steps",
                f"exceeds what schedule.warmup_steps={warmup} leaves of training.num_steps={steps}",
                "shorten one of them or train longer",
            )
        return self

    def _check_recompute(self) -> None:
        """What is recomputed must be there."""
        recomputable = [*self.attention.recomputable, "mlp"]
        for name in self.training.recompute_modules or []:
            if name not in recomputable:
                raise self.training.problem(
                    "recompute_modules",
                    f"{name} is nothing that attention.kind={self.attention.kind} can recompute",
                    f"use some of {recomputable}",
                )
        stages = self.parallel.layers_of_stages(self.model.num_layers)
        pieces = [layers // self.parallel.virtual_pipeline for layers in stages]
        if (self.training.recompute_layers or 0) > min(pieces):
            raise self.training.problem(
                "recompute_layers",
                f"exceeds the {min(pieces)} layers of a pipeline stage's piece",
                f"use at most {min(pieces)}, or leave it out to recompute all",
            )

    def _check_engine(self) -> None:
        """What the engine cannot do, it does not get."""
        if self.training.engine == "megatron":
            if self.deepspeed != DeepSpeedConfig():
                raise self.training.problem(
                    "engine",
                    "does not use the section deepspeed, which is set",
                    "set training.engine=deepspeed, or take the section out",
                )
            return
        if self.parallel.pipeline > 1:
            raise self.parallel.problem(
                "pipeline",
                "pipelines run on Megatron-core's schedules, which training.engine=deepspeed does not use",
                "set training.engine=megatron, or parallel.pipeline=1",
            )
        for section, field, instead in (
            (self.optimizer, "distributed", "deepspeed.zero_stage=1"),
            (self.parallel, "overlap_gradient_reduce", "deepspeed.settings.zero_optimization.overlap_comm"),
        ):
            if getattr(section, field):
                raise section.problem(
                    field,
                    "belongs to Megatron-core's engine, and training.engine=deepspeed",
                    f"use {instead}, or set training.engine=megatron",
                )
        if self.health.replica_check_interval is not None and self.deepspeed.zero_stage == 3:
            raise self.health.problem(
                "replica_check_interval",
                "at deepspeed.zero_stage=3 the data ranks hold shards of the weights, and no copies",
                "leave it out, or use stage 0, 1 or 2",
            )
        if self.training.precision == "bfloat16" and self.deepspeed.zero_stage == 0:
            # Seen with 0.19.8: the norm counts one tensor rank, and Adam's step is off by one.
            raise self.deepspeed.problem(
                "zero_stage",
                "DeepSpeed clips and updates wrongly in bfloat16 at stage 0",
                "use 1, 2 or 3, or training.precision=float32, or training.engine=megatron",
            )

    @property
    def recomputed_modules(self) -> list[str]:
        """Under selective recomputation, `training.recompute_modules`, with the default filled in."""
        if self.training.recompute != "selective":
            return []
        return list(self.training.recompute_modules or self.attention.recomputable)

    def replaced(self, changes: dict[str, Any]) -> RunConfig:
        """The config with other values, by `section.field`, held to all rules again.

        Raises:
            UserError: the values break a rule.
        """
        sections = {name: getattr(self, name) for name in RunConfig.model_fields}
        by_section: dict[str, dict[str, Any]] = {}
        for path, value in changes.items():
            section, field = path.split(".")
            by_section.setdefault(section, {})[field] = value
        for name, values in by_section.items():
            stated = sections[name].model_dump(exclude_unset=True)
            sections[name] = type(sections[name]).model_validate(stated | values)
        return RunConfig(**sections)

    def check_world_size(self, world_size: int) -> int:
        """Data-parallel degree that `world_size` ranks leave.

        Raises:
            FieldError: the layout or the batch does not fit; says which world sizes would.
        """
        model_size = self.parallel.model_size
        samples, micro = self.training.global_batch_size, self.training.micro_batch_size
        fitting = [
            model_size * degree
            for degree in range(1, samples // micro + 1)
            if samples % (micro * degree) == 0
        ]
        if world_size % model_size:
            raise FieldError(
                "world size",
                world_size,
                f"must be a multiple of {model_size}, the ranks of one model "
                f"({self.parallel.describe_model_ranks()})",
                f"start {' or '.join(map(str, fitting[:4]))} processes "
                f"(launch/torchrun.sh {fitting[0]} CONFIG), or change the degrees",
            )
        data_parallel = world_size // model_size
        if samples % (micro * data_parallel):
            raise FieldError(
                "training.global_batch_size",
                samples,
                f"must be a multiple of micro_batch_size × data-parallel ranks = {micro} × {data_parallel}",
                f"start {' or '.join(map(str, fitting[:4]))} processes, or change the batch sizes",
            )
        self.parallel.check_microbatches(self.training.num_microbatches(data_parallel))
        return data_parallel
