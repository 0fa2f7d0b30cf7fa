"""The training step of the model of transformers that has the parameters of a run, as a user would write it.

for each microbatch: loss of the model's own loss function -> backward
-> torch's gradient clipping -> torch's fused AdamW
"""

from __future__ import annotations

from typing import Any

import torch

from sas_megatron.checkpoint.export_formats import choose_format
from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.model.language_loss import Batch


def check_comparable(config: RunConfig) -> None:
    """Check that transformers has a model of the same parameters, and that one process can train it.

    Raises:
        UserError: The run has a model that transformers lacks, more than one rank, or another precision.
    """
    export_format, obstacle = choose_format(config.model, config.attention)
    if export_format is None:
        raise UserError(
            f"--transformers: no model of transformers has BASE's {obstacle}; use a config of mha, such as "
            "configs/quickstart_mha.yaml"
        )
    if config.parallel.model_size > 1:
        raise UserError(
            f"--transformers: trains in one process, but BASE has {config.parallel.describe_model_ranks()}; "
            "add overrides that set each to 1"
        )
    if config.training.precision != "float32":
        raise UserError(
            f"--transformers: compares in float32, but BASE has training.precision="
            f"{config.training.precision}; add the override training.precision=float32"
        )


class TransformersStep:
    """A model of transformers with random weights, and its optimizer."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.model = build_model(config).to(device).train()
        settings = config.optimizer
        self.max_norm = settings.clip_gradient_norm
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def run(self, batch: Batch, *, num_microbatches: int) -> None:
        """Take one optimizer step on `num_microbatches` times the batch."""
        for _ in range(num_microbatches):
            loss = self.model(input_ids=batch["tokens"], labels=batch["labels"], use_cache=False).loss
            (loss / num_microbatches).backward()
        if self.max_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build_model(config: RunConfig) -> Any:
    """Build the model of transformers that an export of the run has, with the padded vocabulary."""
    import transformers

    export_format, _ = choose_format(config.model, config.attention)
    assert export_format is not None, "check_comparable() runs before"
    fields = export_format.config_fields(config.model, config.attention)
    (model_class,) = fields.pop("architectures")
    fields |= {
        "vocab_size": config.model.padded_vocab_size,
        "max_position_embeddings": config.data.sequence_length,
        "attention_dropout": config.attention.dropout,
    }
    hf_config = transformers.AutoConfig.for_model(**fields)
    return getattr(transformers, model_class)(hf_config)
