"""The `parallel` section: how many ranks share one model, and how."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from sas_megatron.config.section import Section


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

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        self.require_positive("tensor", "context")
        if self.sequence and self.tensor == 1:
            raise self.problem(
                "sequence",
                "sequence parallelism shards over the tensor group, which has one rank here",
                "set parallel.tensor to 2 or more, or parallel.sequence=false",
            )
        return self

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.context

    def describe_model_ranks(self) -> str:
        """The degrees that make up `model_size`, for messages."""
        return f"parallel.tensor={self.tensor}" + (f" × context={self.context}" if self.context > 1 else "")
