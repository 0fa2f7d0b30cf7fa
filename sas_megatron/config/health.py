"""The `health` section: what is watched while a run trains, and what is done about what is found."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.section import Section


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
