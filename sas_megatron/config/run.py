"""A whole run: all sections together, and the rules that cross them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from sas_megatron.config.attention import AttentionConfig, parse_attention
from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.model import ModelConfig
from sas_megatron.config.optimizer import OptimizerConfig, ScheduleConfig
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.training import CheckpointConfig, EvaluationConfig, LoggingConfig, TrainingConfig


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
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        tensor = self.parallel.tensor
        context = self.parallel.context
        self.attention.check_tensor_parallel(tensor)
        self.attention.check_context_parallel(tensor, context)
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
        if self.parallel.sequence and self.data.sequence_length % self.parallel.model_size:
            raise self.data.problem(
                "sequence_length",
                f"must be divisible by {self.parallel.describe_model_ranks()} under sequence parallelism",
                "change it, or set parallel.sequence=false",
            )
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
                f"(launch/torchrun.sh {fitting[0]} CONFIG), or change parallel.tensor",
            )
        data_parallel = world_size // model_size
        if samples % (micro * data_parallel):
            raise FieldError(
                "training.global_batch_size",
                samples,
                f"must be a multiple of micro_batch_size × data-parallel ranks = {micro} × {data_parallel}",
                f"start {' or '.join(map(str, fitting[:4]))} processes, or change the batch sizes",
            )
        return data_parallel
