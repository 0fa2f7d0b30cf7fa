"""The types and ranges of the fields in a config.json of each format that can be imported.

Whether the native model can express a value is decided in `llama.py` and `gpt_neox.py`; fields that these do
not read are ignored.
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
    """`rope_parameters` of transformers 5."""

    rope_type: str = "default"
    rope_theta: Positive | None = None
    partial_rotary_factor: Annotated[float, Field(ge=0, le=1)] | None = None


class SizeFields(_HFSection):
    """Fields that every format has."""

    model_type: str
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    tie_word_embeddings: bool = False


class LlamaFields(SizeFields):
    """Fields of `LlamaConfig`; None where transformers computes a default."""

    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rms_norm_eps: Positive = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: Probability = 0.0
    rope_theta: Positive = 10000.0
    rope_parameters: RopeParameters | None = None


class NeoXFields(SizeFields):
    """Fields of `GPTNeoXConfig`."""

    layer_norm_eps: Positive = 1e-5
    hidden_dropout: Probability = 0.0
    attention_dropout: Probability = 0.0
    rotary_emb_base: Positive = 10000.0
    rotary_pct: Annotated[float, Field(ge=0, le=1)] = 0.25
    rope_parameters: RopeParameters | None = None


class NativeFields(SizeFields):
    """Fields of `SASMegatronConfig`; `attention` has the rules of the config section."""

    activation: str
    normalization: str
    norm_epsilon: Positive
    linear_bias: bool
    rotary_base: Size
    initializer_range: Positive
    attention: dict[str, Any]
