"""The `health` and `logging` sections."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.errors import FieldError
from sas_megatron.config.section import Section


class HealthConfig(Section):
    """Checks for non-finite and outlying steps, for diverging replicas of weights, and for slow ranks."""

    section_name: ClassVar[str] = "health"

    skipped_in_a_row: int = Field(
        default=3,
        description="Number of consecutive steps that may be skipped because of a spike or a non-finite loss "
        "or gradient. A skipped step uses up its samples and leaves weights, optimizer and schedule "
        "unchanged. The next such step ends the run; with 0, the first such step ends it.",
    )
    spike_response: Literal["record", "skip", "stop"] = Field(
        default="record",
        description="Response to a loss or gradient norm far above the previous ones: record it, also skip "
        "the step, or end the run before the update.",
    )
    spike_threshold: float = Field(
        default=10.0,
        description="Number of deviations above the median that counts as a spike. A deviation is 1.4826 × "
        "the median absolute deviation, and at least 1% of the median.",
    )
    spike_window: int = Field(
        default=64,
        description="Number of previous updates that a step is compared with; the check starts after that "
        "number of updates.",
    )
    replica_check_interval: int | None = Field(
        default=None,
        description="Steps between checks that replicated weights are bitwise equal on all ranks that hold "
        "them; the run ends if they are not. null: never check.",
    )
    straggler_interval: int | None = Field(
        default=None,
        description="Steps between measurements of each rank's own time per step, without the time spent "
        "waiting for other ranks. null: never measure.",
    )
    straggler_excess: float = Field(
        default=0.2,
        description="Report a rank whose own time exceeds the median of its pipeline stage by more than this "
        "fraction.",
    )

    @model_validator(mode="after")
    def _check(self) -> HealthConfig:
        self.require_between(0, float("inf"), "skipped_in_a_row")
        self.require_positive("spike_threshold", "replica_check_interval", "straggler_interval")
        self.require_positive("straggler_excess")
        if self.spike_window < 3:
            raise self.problem(
                "spike_window", "must be 3 or more to have a median and a deviation", "use 64, for example"
            )
        return self


class LoggingConfig(Section):
    """The run directory, and the intervals and contents of logs."""

    section_name: ClassVar[str] = "logging"
    former_names: ClassVar[dict[str, str]] = {"wire_ledger": "communication_counter"}

    @model_validator(mode="before")
    @classmethod
    def _accept_former_tensorboard(cls, fields: Any) -> Any:
        """Read the field `tensorboard` of earlier versions, which `trackers` has replaced."""
        if not isinstance(fields, dict) or not isinstance(fields.get("tensorboard"), bool):
            return fields
        remaining = dict(fields)
        trackers = ["tensorboard"] if remaining.pop("tensorboard") else []
        if remaining.setdefault("trackers", trackers) != trackers:
            kept = [name for name in remaining["trackers"] if name != "tensorboard"] + trackers
            raise FieldError(
                "logging.tensorboard",
                fields["tensorboard"],
                f"has been replaced by logging.trackers, which is {remaining['trackers']}",
                f"remove it, and set logging.trackers=[{', '.join(kept)}]",
            )
        return remaining

    run_directory: str = Field(
        description="Folder for config.yaml, run.json, metrics.jsonl, summary.json and checkpoints/."
    )
    interval: int = Field(
        default=10, description="Steps between logged steps; each logged step is one line of metrics.jsonl."
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default=["tensorboard"],
        description="Programs that show the records: TensorBoard's event files in the run directory, a W&B "
        "project, an MLflow experiment.",
    )
    tracker_project: str = Field(
        default="sas_megatron", description="The W&B project, or the MLflow experiment, of the run."
    )
    tracker_group: str | None = Field(
        default=None, description="The group of the run in W&B and MLflow; a study names its directory."
    )
    tracker_tags: list[str] = Field(
        default=[], description="Tags of the run in W&B and MLflow; a study names the variant and the size."
    )
    communication_counter: bool = Field(
        default=False,
        description="Count the bytes that each rank sends in collectives, by process group, and write them "
        "to summary.json.",
    )
    profile_steps: list[int] | None = Field(
        default=None,
        description="First and last step to profile on every rank. The traces are written to "
        "profile/*.json.gz and open in Perfetto; profiled steps are slower. null: do not profile.",
    )

    @model_validator(mode="after")
    def _check(self) -> LoggingConfig:
        self.require_positive("interval")
        self.require_paths("run_directory")
        if len(set(self.trackers)) < len(self.trackers):
            raise self.problem("trackers", "names a tracker twice", "name each once")
        for field in ("tracker_project", "tracker_group"):
            if getattr(self, field) == "":
                raise self.problem(field, "is empty", "use a name, or leave it out")
        steps = self.profile_steps
        if steps is not None and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise self.problem(
                "profile_steps",
                "must be two step numbers, counted from 1, the first not after the last",
                "use [10, 12] for three steps, or null for none",
            )
        return self
