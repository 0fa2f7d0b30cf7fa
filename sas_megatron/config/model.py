"""The `model` section: the sizes and layers that every attention variant shares."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.section import MAX_INT32, Section

# Far more than any model has; more would take minutes and gigabytes to list.
MAX_LAYERS = 4096

# The fields that each kind of `rotary_scaling` needs, with their values in Llama 3.1 as examples.
ROTARY_SCALINGS: dict[str, dict[str, float]] = {
    "none": {},
    "linear": {"rotary_scaling_factor": 8.0},
    "llama3": {
        "rotary_scaling_factor": 8.0,
        "rotary_low_frequency_factor": 1.0,
        "rotary_high_frequency_factor": 4.0,
        "rotary_original_length": 8192,
    },
}


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
    parallel_residual: bool = Field(
        default=False,
        description="Attention and MLP of a layer read the same hidden states, each through its own norm, "
        "and both results are added to them (GPT-NeoX). Otherwise the MLP reads the sum after attention.",
    )
    tie_embeddings: bool = Field(
        default=False, description="Share one table between the input embedding and the output layer."
    )
    hidden_dropout: float = Field(
        default=0.0, description="Dropout probability on the residual branches and the embedding."
    )
    rotary_base: int = Field(default=10000, description="θ, the base of the rotary embeddings.")
    rotary_scaling: Literal["none", "linear", "llama3"] = Field(
        default="none",
        description="Scaling of the rotary frequencies, for sequences longer than those of earlier training. "
        "linear: all are divided by rotary_scaling_factor (Chen et al. 2023, arXiv 2306.15595); llama3: only "
        "the low ones, as in Llama 3.1.",
    )
    rotary_scaling_factor: float | None = Field(
        default=None, description="Factor by which rotary frequencies are divided; 8.0 in Llama 3.1."
    )
    rotary_low_frequency_factor: float | None = Field(
        default=None,
        description="For llama3: frequencies with fewer rotations in rotary_original_length tokens are "
        "divided by the full factor; 1.0 in Llama 3.1.",
    )
    rotary_high_frequency_factor: float | None = Field(
        default=None,
        description="For llama3: frequencies with more rotations in rotary_original_length tokens do not "
        "change, and those in between change gradually; 4.0 in Llama 3.1.",
    )
    rotary_original_length: int | None = Field(
        default=None,
        description="For llama3: the number of tokens of a sequence in earlier training; 8192 in Llama 3.1.",
    )
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
        self._check_rotary_scaling()
        return self

    def _check_rotary_scaling(self) -> None:
        """Check that the fields of `rotary_scaling` are given, and no others, and are in range."""
        needed = ROTARY_SCALINGS[self.rotary_scaling]
        for field, example in ROTARY_SCALINGS["llama3"].items():
            value = getattr(self, field)
            if field in needed and value is None:
                raise self.problem(
                    field, f"is required by model.rotary_scaling={self.rotary_scaling}", f"use {example}"
                )
            if field not in needed and value is not None:
                raise self.problem(
                    field,
                    f"has no effect with model.rotary_scaling={self.rotary_scaling}",
                    "omit it, or set model.rotary_scaling=llama3",
                )
        self.require_positive(*ROTARY_SCALINGS["llama3"])
        if self.rotary_scaling_factor is not None and self.rotary_scaling_factor < 1:
            raise self.problem(
                "rotary_scaling_factor", "must be at least 1, since frequencies are divided by it", "use 1.0"
            )
        low, high = self.rotary_low_frequency_factor, self.rotary_high_frequency_factor
        if low is not None and high is not None and high <= low:
            raise self.problem(
                "rotary_high_frequency_factor",
                f"must be above model.rotary_low_frequency_factor={low}",
                f"use {4 * low}",
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: vocab_size rounded up to vocab_multiple, the same on every layout."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
