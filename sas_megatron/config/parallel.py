"""The `parallel` section: the degrees of tensor, context, pipeline and sequence parallelism."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from sas_megatron.config.errors import FieldError
from sas_megatron.config.section import MAX_INT32, Section, divisors, largest_at_most


class ParallelConfig(Section):
    """Degrees of model parallelism; the data-parallel degree is the world size divided by their product."""

    section_name: ClassVar[str] = "parallel"

    tensor: int = Field(
        default=1,
        description="P, tensor-parallel degree: ranks that shard each layer's heads and MLP columns.",
    )
    sequence: bool = Field(
        default=False,
        description="Sequence parallelism: shard normalizations and residuals over tokens within the tensor "
        "group.",
    )
    context: int = Field(
        default=1,
        description="C, context-parallel degree: ranks that shard each sequence; attention exchanges tokens "
        "for heads.",
    )
    pipeline: int = Field(
        default=1, description="Pipeline-parallel degree: number of stages that the layers are divided into."
    )
    virtual_pipeline: int = Field(
        default=1,
        description="Model chunks per pipeline stage, for the interleaved schedule: divides the pipeline "
        "bubble by this number and multiplies the sends between stages by it.",
    )
    first_stage_layers: int | None = Field(
        default=None,
        description="Layers of the first stage, which also holds the embedding. null: as on the other stages."
        "",
    )
    last_stage_layers: int | None = Field(
        default=None,
        description="Layers of the last stage, which also holds the output layer. null: as on the other "
        "stages.",
    )
    overlap_gradient_reduce: bool = Field(
        default=False,
        description="Overlap the reduction of gradients over the data-parallel ranks with the backward pass.",
    )
    overlap_parameter_gather: bool = Field(
        default=False,
        description="Overlap the all-gather of updated parameters with the next forward pass; requires the "
        "distributed optimizer.",
    )

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        self.require_positive("tensor", "context", "pipeline", "virtual_pipeline")
        self.require_positive("first_stage_layers", "last_stage_layers")
        if self.model_size > MAX_INT32:
            raise FieldError(
                "parallel",
                self.describe_model_ranks(),
                f"gives {self.model_size:,} ranks, and torch numbers at most {MAX_INT32:,}",
                "use smaller degrees",
            )
        if self.sequence and self.tensor == 1:
            raise self.problem(
                "sequence",
                "sequence parallelism shards over the tensor group, which has only one rank",
                "set parallel.tensor to 2 or more, or parallel.sequence=false",
                ("parallel.sequence=false",),
            )
        for field in ("virtual_pipeline", "first_stage_layers", "last_stage_layers"):
            if self.pipeline == 1 and getattr(self, field) not in (None, 1):
                raise self.problem(
                    field,
                    "requires pipeline parallelism, and parallel.pipeline=1",
                    f"set parallel.pipeline to 2 or more, or remove parallel.{field}",
                    (f"parallel.{field}={'1' if field == 'virtual_pipeline' else 'null'}",),
                )
        if self.overlap_parameter_gather and not self.overlap_gradient_reduce:
            raise self.problem(
                "overlap_parameter_gather",
                "requires parallel.overlap_gradient_reduce=true, whose buckets it gathers",
                "set both or neither",
                ("parallel.overlap_gradient_reduce=true",),
            )
        return self

    @property
    def model_size(self) -> int:
        """The number of ranks that hold one copy of the model."""
        return self.tensor * self.context * self.pipeline

    def describe_model_ranks(self) -> str:
        """Return the degrees whose product is `model_size`, for messages."""
        return self._describe("tensor", "context", "pipeline")

    def describe_sequence_ranks(self) -> str:
        """Return the degrees that shard a sequence's tokens under sequence parallelism, for messages."""
        return self._describe("tensor", "context")

    def _describe(self, first: str, *others: str) -> str:
        degrees = [f"parallel.{first}={getattr(self, first)}"]
        degrees += [f"{name}={getattr(self, name)}" for name in others if getattr(self, name) > 1]
        return " × ".join(degrees)

    def check_layers(self, num_layers: int) -> None:
        """Check that `num_layers` layers can be divided over the pipeline stages.

        Raises:
            FieldError: A stage would get no layer, or a stage's layers do not divide into its model chunks.
        """
        given = {
            field: getattr(self, field)
            for field in ("first_stage_layers", "last_stage_layers")
            if getattr(self, field) is not None
        }
        other_layers, num_other_stages = num_layers - sum(given.values()), self.pipeline - len(given)
        if num_other_stages == 0 and other_layers:
            raise self.problem(
                "last_stage_layers",
                f"must add up to model.num_layers={num_layers} together with "
                f"parallel.first_stage_layers={self.first_stage_layers}",
                "leave one of them out",
                ("parallel.last_stage_layers=null",),
            )
        if num_other_stages and (other_layers < num_other_stages or other_layers % num_other_stages):
            rest = f" without {' and '.join(f'{name}={n}' for name, n in given.items())}" if given else ""
            raise self.problem(
                "pipeline",
                f"its {num_other_stages} stages{rest} must share {other_layers} of "
                f"model.num_layers={num_layers} layers evenly, with at least one each",
                "use another number of stages, or set parallel.first_stage_layers or "
                "parallel.last_stage_layers",
                (
                    f"parallel.pipeline={largest_at_most(self.pipeline, divisors(num_layers))}",
                    *(f"parallel.{field}=null" for field in given),
                ),
            )
        if num_other_stages == 0 and self.pipeline == 2 and self.virtual_pipeline > 1:
            # Megatron-core 0.16.1 divides the other layers by the number of other stages, which is 0.
            raise self.problem(
                "last_stage_layers",
                "must not be set for two interleaved stages if parallel.first_stage_layers is set, a limit "
                "of Megatron-core",
                "leave it out: the last stage gets the remaining layers",
                ("parallel.last_stage_layers=null",),
            )
        for layers in dict.fromkeys(self.layers_of_stages(num_layers)):
            if layers % self.virtual_pipeline:
                choices = divisors(layers)
                raise self.problem(
                    "virtual_pipeline",
                    f"must divide the layers of each stage, and one has {layers}",
                    f"use one of {choices}",
                    (f"parallel.virtual_pipeline={largest_at_most(self.virtual_pipeline, choices)}",),
                )

    def check_stage(self, stage: int) -> None:
        """Check that `stage` is the index of a pipeline stage.

        Raises:
            FieldError: The pipeline has fewer stages.
        """
        if not 0 <= stage < self.pipeline:
            raise FieldError(
                "stage",
                stage,
                f"must be one of parallel.pipeline={self.pipeline}",
                f"use 0 to {self.pipeline - 1}",
            )

    def layers_of_stages(self, num_layers: int) -> list[int]:
        """Return the number of layers of each pipeline stage, summed over its model chunks."""
        uneven = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        given = {stage: layers for stage, layers in uneven.items() if layers is not None}
        even = (num_layers - sum(given.values())) // max(1, self.pipeline - len(given))
        return [given.get(stage, even) for stage in range(self.pipeline)]

    @property
    def microbatch_group_size(self) -> int:
        """Microbatches that a model chunk processes before the next chunk; 1 without interleaved stages."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    def check_microbatches(self, num_microbatches: int) -> None:
        """Check that the interleaved schedule can process `num_microbatches` per step.

        Raises:
            FieldError: They are not a multiple of the number of interleaved stages.
        """
        if num_microbatches % self.microbatch_group_size:
            raise self.problem(
                "virtual_pipeline",
                f"interleaved stages process microbatches in groups of parallel.pipeline={self.pipeline}, "
                f"and a step has {num_microbatches} on each data-parallel rank",
                "change the batch sizes, or set parallel.virtual_pipeline=1",
                ("parallel.virtual_pipeline=1",),
            )
