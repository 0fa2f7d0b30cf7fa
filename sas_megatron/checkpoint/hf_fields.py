"""The types and ranges of the fields in a config.json of each format that can be imported.

Whether the native model can express a value is decided in `llama.py`, `qwen.py` and `gpt_neox.py`. Fields
that these do not read are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

from sas_megatron.config.section import MAX_INTEGER, Section

Size = Annotated[int, Field(gt=0, le=MAX_INTEGER)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class _HFSection(Section):
    model_config = ConfigDict(extra="ignore")

    section_name: ClassVar[str] = "config.json"


class RopeParameters(_HFSection):
    """`rope_parameters` of transformers 5, or `rope_scaling` of transformers 4."""

    rope_type: str = "default"
    # An older name of `rope_type`.
    type: str = "default"
    rope_theta: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(ge=0, le=1)] | None = None
    factor: Annotated[float, Field(ge=1)] | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Size | None = None


class SizeFields(_HFSection):
    """Fields that every format has."""

    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | None = None
    rope_scaling: RopeParameters | None = None
    max_position_embeddings: Size | None = None
    original_max_position_embeddings: Size | None = None


class LlamaFields(SizeFields):
    """Fields of `LlamaConfig`; None where transformers computes a default."""

    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rms_norm_eps: Positive = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: Probability = 0.0
    rope_theta: Positive = 10000.0


class Qwen2Fields(SizeFields):
    """Fields of `Qwen2Config`."""

    num_key_value_heads: Size
    head_dim: Size | None = None
    rms_norm_eps: Positive = 1e-6
    attention_dropout: Probability = 0.0
    use_sliding_window: bool = False
    rope_theta: Positive = 10000.0


class Qwen3Fields(Qwen2Fields):
    """Fields of `Qwen3Config`, whose default of `head_dim` does not depend on the other sizes."""

    head_dim: Size
    attention_bias: bool = False


class NeoXFields(SizeFields):
    """Fields of `GPTNeoXConfig`."""

    use_parallel_residual: bool = True
    layer_norm_eps: Positive = 1e-5
    hidden_dropout: Probability = 0.0
    attention_dropout: Probability = 0.0
    rotary_emb_base: Positive = 10000.0
    rotary_pct: Annotated[float, Field(ge=0, le=1)] = 0.25


class NativeFields(SizeFields):
    """Fields of `SASMegatronConfig`; `attention` has the rules of the config section."""

    activation: str
    normalization: str
    norm_epsilon: Positive
    linear_bias: bool
    rotary_base: Size
    initializer_range: Positive
    parallel_residual: bool = False
    rotary_scaling: str = "none"
    rotary_scaling_factor: Positive | None = None
    rotary_low_frequency_factor: Positive | None = None
    rotary_high_frequency_factor: Positive | None = None
    rotary_original_length: Size | None = None
    attention: dict[str, Any]
