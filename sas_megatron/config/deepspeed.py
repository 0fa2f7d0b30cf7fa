"""The `deepspeed` section: what DeepSpeed's engine is told beyond the rest of the config."""

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
