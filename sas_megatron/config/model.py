"""The `model` section: the transformer around the attention."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.section import Section


class ModelConfig(Section):
    """Sizes and parts of the GPT that every attention variant shares."""

    section_name: ClassVar[str] = "model"

    num_layers: int = Field(description="Transformer layers.")
    hidden_size: int = Field(description="H, the width of the residual stream.")
    ffn_hidden_size: int = Field(description="Width of the MLP (of each half for swiglu).")
    vocab_size: int = Field(description="Pieces of the tokenizer; the tables are padded to vocab_multiple.")
    vocab_multiple: int = Field(
        default=128,
        description="The embedding's rows are rounded up to a multiple of this, whatever the layout.",
    )
    activation: Literal["swiglu", "gelu"] = Field(default="swiglu", description="Of the MLP.")
    normalization: Literal["rmsnorm", "layernorm"] = Field(
        default="rmsnorm", description="Before each block."
    )
    norm_epsilon: float = Field(default=1e-5, description="Added to the variance in each norm.")
    linear_bias: bool = Field(default=False, description="Biases in the MLP and attention projections.")
    tie_embeddings: bool = Field(default=False, description="One table for input and output embedding.")
    hidden_dropout: float = Field(default=0.0, description="Dropout on the residual branches and embedding.")
    rotary_base: int = Field(default=10000, description="θ of the rotary positions.")
    init_std: float = Field(default=0.02, description="σ of N(0, σ); output projections use σ/√(2·layers).")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        self.require_positive(
            "num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "vocab_multiple", "rotary_base"
        )
        self.require_positive("init_std", "norm_epsilon")
        self.require_between(0.0, 1.0, "hidden_dropout")
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to vocab_multiple, the same at every layout."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple
