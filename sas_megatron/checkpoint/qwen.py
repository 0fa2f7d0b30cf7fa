"""The formats of Qwen2 and Qwen3: Llama's layers, with biases of query, key and value, or with QK-norm.

Qwen3's norms have one scale for the features of all heads and precede the rotary embeddings, as
`attention.qk_norm` does. The weights are converted by `llama.py`.
"""

from __future__ import annotations

from typing import Any

from sas_megatron.checkpoint.hf_config import HFConfig
from sas_megatron.checkpoint.llama import (
    check_llama_layers,
    common_llama_fields,
    first_obstacle,
    read_llama_layers,
)
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.model import ModelConfig


def find_qwen2_obstacle(model: ModelConfig, attention: AttentionConfig) -> str | None:
    """Return the first field, with its value, that Qwen2's format cannot express; None if there is none."""
    fits = {
        **check_llama_layers(model, attention),
        "model.linear_bias": not model.linear_bias,
        "attention.qkv_bias": attention.qkv_bias,
        "attention.qk_norm": not attention.qk_norm,
    }
    return first_obstacle(fits, model, attention)


def find_qwen3_obstacle(model: ModelConfig, attention: AttentionConfig) -> str | None:
    """Return the first field, with its value, that Qwen3's format cannot express; None if there is none."""
    fits = {
        **check_llama_layers(model, attention),
        "model.linear_bias": not model.linear_bias,
        "attention.qkv_bias": not attention.qkv_bias,
        "attention.qk_norm": attention.qk_norm,
    }
    return first_obstacle(fits, model, attention)


def qwen2_config(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Return the fields of `Qwen2Config` for a model for which `find_qwen2_obstacle` returns None."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **common_llama_fields(model, attention),
        "use_sliding_window": False,
    }


def qwen3_config(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Return the fields of `Qwen3Config` for a model for which `find_qwen3_obstacle` returns None."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **common_llama_fields(model, attention),
        "attention_bias": False,
        "use_sliding_window": False,
    }


def read_qwen2_config(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the config of a Qwen2 to the sections `model` and `attention`.

    Raises:
        FieldError: The native model cannot express a field.
        FileProblem: A field is missing.
    """
    config.require("use_sliding_window", False)
    model, attention = read_llama_layers(config)
    return model, {**attention, "qkv_bias": True}


def read_qwen3_config(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the config of a Qwen3 to the sections `model` and `attention`.

    Raises:
        FieldError: The native model cannot express a field.
        FileProblem: A field is missing.
    """
    config.require("use_sliding_window", False)
    # It would add biases to all projections of the attention and none to the MLP.
    config.require("attention_bias", False)
    model, attention = read_llama_layers(config)
    return model, {**attention, "qk_norm": True}
