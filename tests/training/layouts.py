"""The table of tested layouts, and the attention variants that are combined with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.run_configs import small_config

ATTENTIONS: dict[str, small.Attention] = {
    "mha": small.MHA,
    "gqa": small.GQA,
    "mla": small.MLA,
    "sas-gather": {**small.SAS, "head_expansion": 2, "exchange": "gather"},
    "sas-all_to_all": {**small.SAS_GROUPED, "head_expansion": 2, "exchange": "all_to_all"},
    "modified": {**small.GQA, **small.MODIFIERS, "output_gate": "headwise"},
    # With all modifiers, rounding grows in five steps, since the output norm divides small differences.
    # Qwen2's biases and Qwen3's norms.
    "biased": {**small.GQA, "qkv_bias": True, "qk_norm": True},
    "diff": {**small.DIFF_GROUPED, **small.MODIFIERS, "output_norm": False},
    "mfa": small.MFA,
    # The authors initialize the output projection to 0; the factors' gradients of the first step would be 0.
    "tpa": {**small.TPA, "initialization": "normal"},
}

TIED = {"tie_embeddings": True, "linear_bias": True, "normalization": "layernorm", "activation": "gelu"}
PYTHIA = {
    "parallel_residual": True,
    "linear_bias": True,
    "normalization": "layernorm",
    "activation": "gelu",
    "rotary_scaling": "linear",
    "rotary_scaling_factor": 3.0,
}
OVERLAP = {"overlap_gradient_reduce": True, "overlap_parameter_gather": True}
SHARDED = {"distributed": True}
CHUNKED = {"output_loss": "chunked"}


@dataclass(frozen=True)
class Layout:
    """A layout of `world_size` ranks. The ranks that `parallel` does not use are data-parallel.

    The fields of `model` also apply to the run in one process to which the layout is compared.
    """

    world_size: int
    parallel: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    deepspeed: dict[str, Any] | None = None

    @property
    def num_layers(self) -> int:
        """Four with pipeline parallelism, otherwise two."""
        return int(self.model.get("num_layers", 4 if self.parallel.get("pipeline", 1) > 1 else 2))

    @property
    def micro_batch_size(self) -> int:
        """Two; without pipeline parallelism, the size at which each data rank has two microbatches."""
        if self.parallel.get("pipeline", 1) > 1 or self.world_size == 1:
            return 2
        model_size = self.parallel.get("tensor", 1) * self.parallel.get("context", 1)
        return max(1, 4 * model_size // self.world_size)

    def config(self, attention: str) -> RunConfig:
        """Return a run of one of `ATTENTIONS` on this layout with eight samples per step."""
        return self.config_of(ATTENTIONS[attention])

    def config_of(self, attention: small.Attention) -> RunConfig:
        """Return a run on this layout with eight samples per step."""
        sections: dict[str, Any] = {
            "attention": attention,
            "model": {**self.model, "num_layers": self.num_layers},
            "data": {"sequence_length": 16},
            "parallel": self.parallel,
            "optimizer": {"learning_rate": 0.01, **self.optimizer},
            "schedule": {"warmup_steps": 2},
            "evaluation": {"num_sequences": 4, "probe_sequences": 3},
            "training": {
                "num_steps": 9,
                "global_batch_size": 8,
                "micro_batch_size": self.micro_batch_size,
                **self.training,
            },
        }
        if self.deepspeed is not None:
            sections["training"]["engine"] = "deepspeed"
            sections["deepspeed"] = self.deepspeed
        return small_config(**sections)

    def single_process(self, attention: str) -> RunConfig:
        """Return a run of the same model in one process with Megatron-core's engine, loss and activations."""
        model = {**self.model, "num_layers": self.num_layers, "output_loss": "full"}
        return Layout(1, model=model).config(attention)


# Each kind of parallelism separately, then combinations.
LAYOUTS: dict[str, Layout] = {
    "one rank, selective recompute": Layout(1, training={"recompute": "selective"}),
    "one rank, full recompute": Layout(1, training={"recompute": "full"}),
    "one rank, full recompute of one layer": Layout(1, training={"recompute": "full", "recompute_layers": 1}),
    "tensor 2": Layout(2, {"tensor": 2}),
    "tensor 2, sequence": Layout(2, {"tensor": 2, "sequence": True}),
    "tensor 4": Layout(4, {"tensor": 4}),
    "tensor 4, sequence": Layout(4, {"tensor": 4, "sequence": True}),
    "pipeline 2": Layout(2, {"pipeline": 2}),
    "pipeline 2, tied": Layout(2, {"pipeline": 2}, model=TIED),
    "pipeline 2, uneven": Layout(2, {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3}),
    "pipeline 2, interleaved": Layout(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pipeline 4": Layout(4, {"pipeline": 4}),
    "context 2": Layout(2, {"context": 2}),
    "context 4": Layout(4, {"context": 4}),
    "data 2": Layout(2),
    "data 2, overlapped": Layout(2, {"overlap_gradient_reduce": True}),
    "data 2, distributed optimizer": Layout(2, optimizer=SHARDED),
    "data 2, distributed optimizer, overlapped": Layout(2, OVERLAP, SHARDED),
    "tensor 2, sequence, parallel branches": Layout(2, {"tensor": 2, "sequence": True}, model=PYTHIA),
    "pipeline 2, parallel branches, recompute": Layout(
        2, {"pipeline": 2}, training={"recompute": "full"}, model=PYTHIA
    ),
    "tensor 2, data 2": Layout(4, {"tensor": 2}),
    "tensor 2, sequence, pipeline 2": Layout(4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "tensor 2, sequence, pipeline 2, tied, selective recompute": Layout(
        4,
        {"tensor": 2, "sequence": True, "pipeline": 2},
        training={"recompute": "selective", "recompute_modules": ["attention", "mlp"]},
        model=TIED,
    ),
    "tensor 2, sequence, pipeline 2, tied, chunked loss": Layout(
        4, {"tensor": 2, "sequence": True, "pipeline": 2}, model={**TIED, **CHUNKED}
    ),
    "tensor 4, chunked loss": Layout(4, {"tensor": 4}, model=CHUNKED),
    "tensor 2, tied, chunked loss": Layout(2, {"tensor": 2}, model={**TIED, **CHUNKED}),
    "tensor 2, pipeline 2 interleaved": Layout(4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "tensor 2, context 2": Layout(4, {"tensor": 2, "context": 2}),
    "tensor 2, sequence, context 2, selective recompute": Layout(
        4, {"tensor": 2, "sequence": True, "context": 2}, training={"recompute": "selective"}
    ),
    "context 2, data 2, distributed optimizer": Layout(4, {"context": 2}, SHARDED),
    "pipeline 2, context 2, full recompute": Layout(
        4, {"pipeline": 2, "context": 2}, training={"recompute": "full"}
    ),
    "pipeline 2 interleaved, data 2, distributed optimizer, overlapped": Layout(
        4, {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP}, SHARDED
    ),
    "tensor 2, sequence, data 2, distributed optimizer, overlapped": Layout(
        4, {"tensor": 2, "sequence": True, **OVERLAP}, SHARDED
    ),
    "tensor 2, sequence, pipeline 2, data 2, distributed optimizer": Layout(
        8, {"tensor": 2, "sequence": True, "pipeline": 2}, SHARDED
    ),
    "tensor 2, sequence, pipeline 2 interleaved, context 2": Layout(
        8, {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2, "context": 2}
    ),
    "tensor 2, context 2, data 2, distributed optimizer, overlapped": Layout(
        8, {"tensor": 2, "context": 2, **OVERLAP}, SHARDED
    ),
    "pipeline 2 tied, context 2, data 2, distributed optimizer": Layout(
        8, {"pipeline": 2, "context": 2}, SHARDED, model=TIED
    ),
    **{
        f"DeepSpeed stage {stage}, {name}": Layout(
            world_size, parallel, model=model, deepspeed={"zero_stage": stage}
        )
        for name, world_size, parallel, model in (
            ("data 2", 2, {}, {}),
            ("tensor 2, data 2", 4, {"tensor": 2}, {}),
            ("tensor 2, sequence, data 2, tied", 4, {"tensor": 2, "sequence": True}, TIED),
            ("tensor 2, context 2", 4, {"tensor": 2, "context": 2}, {}),
        )
        for stage in range(4)
    },
    "DeepSpeed stage 3, tensor 2, sequence, data 2, chunked loss": Layout(
        4, {"tensor": 2, "sequence": True}, model=CHUNKED, deepspeed={"zero_stage": 3}
    ),
    "DeepSpeed stage 3, tensor 2, data 2, tied, chunked loss": Layout(
        4, {"tensor": 2}, model={**TIED, **CHUNKED}, deepspeed={"zero_stage": 3}
    ),
}

# The layouts and attentions of the default test run. Each layout here executes code of this package or of
# Megatron-core's schedules that the previous ones do not. Each attention is combined with tensor, pipeline,
# context and data parallelism.
DEFAULT_PAIRS = {
    ("one rank, selective recompute", "sas-gather"),
    ("one rank, full recompute", "mla"),
    ("one rank, full recompute of one layer", "tpa"),
    ("tensor 2", "mfa"),
    ("tensor 2, sequence", "sas-all_to_all"),
    ("tensor 2, sequence", "biased"),
    ("tensor 2, sequence, parallel branches", "mha"),
    ("pipeline 2, parallel branches, recompute", "sas-gather"),
    ("tensor 4", "gqa"),
    ("tensor 4, sequence", "diff"),
    ("pipeline 2", "gqa"),
    ("pipeline 2, tied", "mha"),
    ("pipeline 2, uneven", "sas-gather"),
    ("pipeline 2, interleaved", "mla"),
    ("pipeline 2, interleaved", "diff"),
    ("pipeline 4", "mfa"),
    ("context 2", "tpa"),
    ("context 2", "modified"),
    ("data 2", "mfa"),
    ("data 2, distributed optimizer", "mha"),
    ("data 2, distributed optimizer, overlapped", "sas-all_to_all"),
    ("tensor 2, sequence, pipeline 2, tied, selective recompute", "tpa"),
    ("tensor 2, sequence, pipeline 2, tied, chunked loss", "mha"),
    ("tensor 2, sequence, context 2, selective recompute", "sas-all_to_all"),
    ("context 2, data 2, distributed optimizer", "mla"),
    ("pipeline 2, context 2, full recompute", "mha"),
    ("pipeline 2 interleaved, data 2, distributed optimizer, overlapped", "gqa"),
    ("tensor 2, sequence, data 2, distributed optimizer, overlapped", "mla"),
    ("DeepSpeed stage 0, tensor 2, data 2", "mha"),
    ("DeepSpeed stage 1, tensor 2, context 2", "gqa"),
    ("DeepSpeed stage 3, tensor 2, data 2", "tpa"),
}
