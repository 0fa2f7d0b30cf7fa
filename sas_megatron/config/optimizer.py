"""The `optimizer`, `schedule` and `deepspeed` sections."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.section import Section

# Keys of DeepSpeed's own configuration -> the field of this config that sets them.
SET_BY_OTHER_FIELDS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "optimizer.clip_gradient_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "data_types.grad_accum_dtype": "training.precision",
    "communication_data_type": "training.precision",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "zero_optimization.stage": "deepspeed.zero_stage",
}


def _without(settings: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of DeepSpeed's entries without a dotted key."""
    section, _, name = key.rpartition(".")
    if section:
        return settings | {section: _without(settings[section], name)}
    return {other: value for other, value in settings.items() if other != key}


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay; weight decay is not applied to normalization weights and biases."""

    section_name: ClassVar[str] = "optimizer"

    learning_rate: float = Field(description="Peak learning rate.")
    weight_decay: float = Field(default=0.1, description="Decoupled weight decay of matrices.")
    beta1: float = Field(default=0.9, description="Exponential decay rate of the first moment.")
    beta2: float = Field(default=0.95, description="Exponential decay rate of the second moment.")
    epsilon: float = Field(default=1e-8, description="Epsilon added to the square root of the second moment.")
    clip_gradient_norm: float = Field(
        default=1.0, description="Maximum global gradient norm; 0 disables gradient clipping."
    )
    distributed: bool = Field(
        default=False,
        description="Shard the optimizer states over the data-parallel ranks (Megatron-core's distributed "
        "optimizer).",
    )
    simulation_learning_rate_multiplier: float = Field(
        default=1.0,
        description="Factor on learning_rate for the weights of the head and feature simulation of SAS.",
    )
    simulation_weight_decay_multiplier: float = Field(
        default=1.0,
        description="Factor on weight_decay for the matrices of the head and feature simulation of SAS; "
        "their biases have no weight decay.",
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        self.require_positive("learning_rate", "epsilon", "simulation_learning_rate_multiplier")
        self.require_between(0.0, 1.0, "beta1", "beta2")
        self.require_between(0.0, float("inf"), "weight_decay", "clip_gradient_norm")
        self.require_between(0.0, float("inf"), "simulation_weight_decay_multiplier")
        return self


class ScheduleConfig(Section):
    """Learning rate schedule: linear warm-up, then the selected shape."""

    section_name: ClassVar[str] = "schedule"

    kind: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = Field(
        default="cosine", description="Shape of the schedule after the warm-up."
    )
    warmup_steps: int = Field(default=0, description="Number of steps of linear warm-up from zero.")
    decay_steps: int | None = Field(
        default=None,
        description="Number of steps of the final linear decay; required by warmup_stable_decay, and not "
        "allowed for other kinds.",
    )
    final_fraction: float = Field(
        default=0.1, description="Final learning rate as a fraction of the peak learning rate."
    )

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        self.require_between(0, float("inf"), "warmup_steps")
        self.require_positive("decay_steps")
        if not 0.0 <= self.final_fraction <= 1.0:
            raise self.problem("final_fraction", "must be between 0 and 1", "use 0.1, for example")
        if (self.kind == "warmup_stable_decay") != (self.decay_steps is not None):
            raise self.problem(
                "decay_steps",
                "must be set if and only if schedule.kind=warmup_stable_decay",
                "set both or neither",
                (f"schedule.kind={'constant' if self.decay_steps is None else 'warmup_stable_decay'}",),
            )
        return self


class DeepSpeedConfig(Section):
    """Settings of the DeepSpeed engine, used with `training.engine=deepspeed` only."""

    section_name: ClassVar[str] = "deepspeed"

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="ZeRO stage: 0 shards nothing over the data-parallel ranks, 1 the optimizer states, 2 "
        "also the gradients, 3 also the parameters.",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Further entries of DeepSpeed's own configuration, passed on unchanged, such as "
        "zero_optimization.offload_optimizer, zero_optimization.offload_param and overlap_comm.",
    )

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        for key, owner in SET_BY_OTHER_FIELDS.items():
            section, _, name = key.rpartition(".")
            entries = self.settings.get(section, {}) if section else self.settings
            if isinstance(entries, dict) and name in entries:
                raise self.problem(
                    "settings",
                    f"{key} is set by {owner} and must not be repeated here",
                    "remove it",
                    (f"deepspeed.settings={json.dumps(_without(self.settings, key))}",),
                )
        return self
