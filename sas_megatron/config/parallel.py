"""The `parallel` section: how many ranks share one model, and how."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from sas_megatron.config.errors import FieldError
from sas_megatron.config.section import Section, divisors


class ParallelConfig(Section):
    """Degrees of parallelism; the data-parallel degree is what the world size leaves over."""

    section_name: ClassVar[str] = "parallel"

    tensor: int = Field(default=1, description="P, ranks that share each layer's heads and MLP columns.")
    sequence: bool = Field(
        default=False, description="Shard norms and residuals over tokens within the tensor group."
    )
    context: int = Field(
        default=1, description="C, ranks that share each sequence; attention trades tokens for heads."
    )
    pipeline: int = Field(default=1, description="Stages, ranks that share the layers.")
    virtual_pipeline: int = Field(
        default=1,
        description="Pieces into which each stage's layers are cut, so that the stages interleave: "
        "1/virtual_pipeline of the bubble for as many times the sends.",
    )
    first_stage_layers: int | None = Field(
        default=None, description="Layers of the first stage, which embeds too; null: as many as the others."
    )
    last_stage_layers: int | None = Field(
        default=None,
        description="Layers of the last stage, which has the output layer; null: as many as the others.",
    )
    overlap_gradient_reduce: bool = Field(
        default=False, description="Reduce gradients over the data ranks while the backward pass goes on."
    )
    overlap_parameter_gather: bool = Field(
        default=False,
        description="Gather updated parameters during the next forward pass; distributed optimizer only.",
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        self.require_positive("tensor", "context", "pipeline", "virtual_pipeline")
        self.require_positive("first_stage_layers", "last_stage_layers")
        if self.sequence and self.tensor == 1:
            raise self.problem(
                "sequence",
                "sequence parallelism shards over the tensor group, which has one rank here",
                "set parallel.tensor to 2 or more, or parallel.sequence=false",
            )
        for field in ("virtual_pipeline", "first_stage_layers", "last_stage_layers"):
            if self.pipeline == 1 and getattr(self, field) not in (None, 1):
                raise self.problem(
                    field,
                    "concerns the stages of a pipeline, and parallel.pipeline=1 has one",
                    "set parallel.pipeline to 2 or more, or leave it out",
                )
        if self.overlap_parameter_gather and not self.overlap_gradient_reduce:
            raise self.problem(
                "overlap_parameter_gather",
                "needs parallel.overlap_gradient_reduce=true, whose buckets it gathers",
                "set both or neither",
            )
        return self

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.context * self.pipeline

    def describe_model_ranks(self) -> str:
        """The degrees that make up `model_size`, for messages."""
        return self._describe("tensor", "context", "pipeline")

    def describe_sequence_ranks(self) -> str:
        """The degrees that share a sequence's tokens under sequence parallelism, for messages."""
        return self._describe("tensor", "context")

    def _describe(self, first: str, *others: str) -> str:
        degrees = [f"parallel.{first}={getattr(self, first)}"]
        degrees += [f"{name}={getattr(self, name)}" for name in others if getattr(self, name) > 1]
        return " × ".join(degrees)

    def check_layers(self, num_layers: int) -> None:
        """Raises `FieldError` where the stages cannot share `num_layers` layers."""
        given = {
            field: getattr(self, field)
            for field in ("first_stage_layers", "last_stage_layers")
            if getattr(self, field) is not None
        }
        left, stages_left = num_layers - sum(given.values()), self.pipeline - len(given)
        if stages_left == 0 and left:
            raise self.problem(
                "last_stage_layers",
                f"must make model.num_layers={num_layers} together with "
                f"parallel.first_stage_layers={self.first_stage_layers}",
                "leave one of them out",
            )
        if stages_left and (left < stages_left or left % stages_left):
            rest = f" without {' and '.join(f'{name}={n}' for name, n in given.items())}" if given else ""
            raise self.problem(
                "pipeline",
                f"its {stages_left} stages{rest} must share {left} of model.num_layers={num_layers} "
                "layers evenly, with at least one each",
                "change it, or set parallel.first_stage_layers or parallel.last_stage_layers",
            )
        if stages_left == 0 and self.pipeline == 2 and self.virtual_pipeline > 1:
            # It divides what is left by the stages that are left (0.16.1).
            raise self.problem(
                "last_stage_layers",
                "is one too many for Megatron-core, of two stages that interleave and have both ends given",
                "leave it out: the last stage has the rest",
            )
        for layers in dict.fromkeys(self.layers_of_stages(num_layers)):
            if layers % self.virtual_pipeline:
                raise self.problem(
                    "virtual_pipeline",
                    f"must divide the layers of each stage, and one has {layers}",
                    f"use one of {divisors(layers)}",
                )

    def check_stage(self, stage: int) -> None:
        """Raises `FieldError` where there is no such pipeline stage."""
        if not 0 <= stage < self.pipeline:
            raise FieldError(
                "stage",
                stage,
                f"must be one of parallel.pipeline={self.pipeline}",
                f"use 0 to {self.pipeline - 1}",
            )

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """Layers of each stage, all its pieces together."""
        uneven = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        given = {stage: layers for stage, layers in uneven.items() if layers is not None}
        even = (num_layers - sum(given.values())) // max(1, self.pipeline - len(given))
        return [given.get(stage, even) for stage in range(self.pipeline)]

    @property
    def microbatch_group_size(self) -> int:
        """Microbatches that interleaved stages take together; 1 where stages do not interleave."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    def check_microbatches(self, num_microbatches: int) -> None:
        """Raises `FieldError` where interleaved stages cannot take turns over a step's microbatches."""
        if num_microbatches % self.microbatch_group_size:
            raise self.problem(
                "virtual_pipeline",
                f"interleaved stages take the microbatches in groups of parallel.pipeline={self.pipeline}, "
                f"and a step has {num_microbatches} on each data-parallel rank",
                "change the batch sizes, or set parallel.virtual_pipeline=1",
            )
