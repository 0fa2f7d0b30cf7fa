"""The `model` section: the sizes and layers that every attention variant shares."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.section import MAX_INT32, Section

# Far more than any model has; more would take minutes and gigabytes to list.
MAX_LAYERS = 4096


class ModelConfig(Section):
    """Sizes of the GPT, and its layers other than attention."""

    section_name: ClassVar[str] = "model"

    num_layers: int = Field(description="Number of transformer layers.")
    hidden_size: int = Field(description="H, the width of the residual stream.")
    ffn_hidden_size: int = Field(
        description="Width of the MLP; for swiglu, the width of the gate and of the up projection."
    )
    vocab_size: int = Field(
        description="Number of tokens of the tokenizer; embedding tables are padded to vocab_multiple."
    )
    vocab_multiple: int = Field(
        default=128,
        description="The number of embedding rows is rounded up to a multiple of this, on every layout.",
    )
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = Field(
        default="swiglu",
        description="Activation function of the MLP. gelu is x·Φ(x), computed with erf; gelu_tanh is its "
        "approximation with tanh (Hendrycks and Gimpel 2016).",
    )
    normalization: Literal["rmsnorm", "layernorm"] = Field(
        default="rmsnorm", description="Normalization before each attention and MLP block."
    )
    norm_epsilon: float = Field(
        default=1e-5, description="Epsilon added to the variance in each normalization."
    )
    linear_bias: bool = Field(
        default=False, description="Add biases to the MLP and the attention projections."
    )
    tie_embeddings: bool = Field(
        default=False, description="Share one table between the input embedding and the output layer."
    )
    hidden_dropout: float = Field(
        default=0.0, description="Dropout probability on the residual branches and the embedding."
    )
    rotary_base: int = Field(default=10000, description="θ, the base of the rotary embeddings.")
    init_std: float = Field(
        default=0.02, description="σ of the N(0, σ) initialization of all matrices but those of output_init."
    )
    output_init: Literal["scaled", "wang", "normal"] = Field(
        default="scaled",
        description="Initialization of the output projections of attention and MLP. scaled: "
        "N(0, σ/√(2·layers)), as in GPT-2; wang: N(0, 2/(layers·√H)), the wang_init of GPT-NeoX; "
        "normal: N(0, σ), as for the other matrices.",
    )

    output_loss: Literal["auto", "chunked", "full"] = Field(
        default="auto",
        description="Computation of the loss. full keeps the probabilities of all tokens over the vocabulary "
        "for the backward pass; chunked computes logits in chunks of 256 MiB, twice; auto selects chunked if "
        "the float32 probabilities of a microbatch exceed one chunk on a rank, or if there is a z-loss.",
    )
    z_loss: float = Field(
        default=0.0,
        description="z in z·log²(Σ exp(logits)), which is added to each token's training loss; 0 for none.",
    )

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        self.require_positive(
            "num_layers", "hidden_size", "ffn_hidden_size", "vocab_size", "vocab_multiple", "rotary_base"
        )
        self.require_positive("init_std", "norm_epsilon")
        self.require_at_most(MAX_LAYERS, "num_layers", reason="each layer is built and counted by itself")
        self.require_at_most(MAX_INT32, "vocab_size", "vocab_multiple", reason="tokens are stored as int32")
        self.require_between(0.0, 1.0, "hidden_dropout")
        self.require_between(0.0, math.inf, "z_loss")
        if self.z_loss > 0 and self.output_loss == "full":
            raise self.problem(
                "z_loss", "needs the chunked loss", "set model.output_loss=auto, or model.z_loss=0"
            )
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to vocab_multiple, the same on every layout."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
