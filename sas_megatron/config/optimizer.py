"""The `optimizer` and `schedule` sections."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.section import Section

# Keys of DeepSpeed's own configuration -> the field of ours that decides them.
DECIDED_ELSEWHERE = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "optimizer.clip_gradient_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "zero_optimization.stage": "deepspeed.zero_stage",
}


class OptimizerConfig(Section):
    """AdamW with decoupled weight decay; norms and biases are never decayed."""

    section_name: ClassVar[str] = "optimizer"

    learning_rate: float = Field(description="Peak learning rate.")
    weight_decay: float = Field(default=0.1, description="Decoupled decay of matrices.")
    beta1: float = Field(default=0.9, description="Decay of the first moment.")
    beta2: float = Field(default=0.95, description="Decay of the second moment.")
    epsilon: float = Field(default=1e-8, description="Added to the root of the second moment.")
    clip_gradient_norm: float = Field(
        default=1.0, description="Largest global gradient norm; 0 switches it off."
    )
    distributed: bool = Field(
        default=False, description="Shard optimizer states over the data-parallel ranks (Megatron-core)."
    )
    simulation_learning_rate_multiplier: float = Field(
        default=1.0, description="Times learning_rate, for the head and feature simulation weights."
    )
    simulation_weight_decay_multiplier: float = Field(
        default=1.0, description="Times weight_decay, for the simulation's matrices (their biases: never)."
    )

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        self.require_positive("learning_rate", "epsilon", "simulation_learning_rate_multiplier")
        self.require_between(0.0, 1.0, "beta1", "beta2")
        self.require_between(0.0, float("inf"), "weight_decay", "clip_gradient_norm")
        self.require_between(0.0, float("inf"), "simulation_weight_decay_multiplier")
        return self


class ScheduleConfig(Section):
    """Learning rate over the steps: linear warm-up, then the chosen shape."""

    section_name: ClassVar[str] = "schedule"

    kind: Literal["cosine", "linear", "constant", "warmup_stable_decay"] = Field(
        default="cosine", description="Shape."
    )
    warmup_steps: int = Field(default=0, description="Steps of linear warm-up from zero.")
    decay_steps: int | None = Field(
        default=None,
        description="Steps of the final linear decay; warmup_stable_decay only, which must state it.",
    )
    final_fraction: float = Field(default=0.1, description="Last learning rate over the peak.")

    @model_validator(mode="after")
    def _check(self) -> ScheduleConfig:
        self.require_between(0, float("inf"), "warmup_steps")
        self.require_positive("decay_steps")
        if not 0.0 <= self.final_fraction <= 1.0:
            raise self.problem("final_fraction", "must lie between 0 and 1", "use 0.1, for example")
        if (self.kind == "warmup_stable_decay") != (self.decay_steps is not None):
            raise self.problem(
                "decay_steps",
                "belongs to schedule.kind=warmup_stable_decay and to no other",
                "set both or neither",
            )
        return self


class DeepSpeedConfig(Section):
    """Used with `training.engine=deepspeed` only."""

    section_name: ClassVar[str] = "deepspeed"

    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="What is sharded over the data ranks: 0 nothing, 1 optimizer states, 2 gradients too, "
        "3 parameters too.",
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Further entries of DeepSpeed's own configuration, passed on as they are: "
        "zero_optimization.offload_optimizer, zero_optimization.offload_param, overlap_comm and so on.",
    )

    @model_validator(mode="after")
    def _check(self) -> DeepSpeedConfig:
        for key, owner in DECIDED_ELSEWHERE.items():
            section, _, name = key.rpartition(".")
            entries = self.settings.get(section, {}) if section else self.settings
            if isinstance(entries, dict) and name in entries:
                raise self.problem(
                    "settings", f"{key} is decided by {owner}, so it must not stand here too", "take it out"
                )
        return self
