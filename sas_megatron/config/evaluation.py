"""The `evaluation` section."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from sas_megatron.config.section import Section


class EvaluationConfig(Section):
    """Held-out loss during training, on the same fixed windows each time."""

    section_name: ClassVar[str] = "evaluation"

    interval: int | None = Field(
        default=None, description="Steps between evaluations; null: evaluate only at the end."
    )
    num_sequences: int = Field(
        default=64,
        description="Number of windows drawn from the validation split; the same windows for every seed.",
    )
    probe_sequences: int = Field(
        default=0,
        description="The first windows on which each evaluation also measures activations, scores and the "
        "simulation by layer (records of the kind `probe` in metrics.jsonl); 0: none.",
    )

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        self.require_positive("interval", "num_sequences")
        if not 0 <= self.probe_sequences <= self.num_sequences:
            raise self.problem(
                "probe_sequences",
                f"must be between 0 and evaluation.num_sequences={self.num_sequences}",
                "use 2, for example",
                (f"evaluation.probe_sequences={min(2, self.num_sequences)}",),
            )
        return self
