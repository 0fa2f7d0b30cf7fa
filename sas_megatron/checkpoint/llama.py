"""The Llama format of transformers: our multi-head and grouped-query models in it, and those in it as ours.

Rotary positions are the same in both: pairs half a head apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sas_megatron.checkpoint.hf_config import HFConfig
from sas_megatron.checkpoint.projections import fuse_projections, split_projection
from sas_megatron.checkpoint.tensor_files import NamedTensors
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.model import ModelConfig

Weights = Mapping[str, torch.Tensor]

# Ours -> theirs, where the tensor is the same; of layers, what follows the layer's own prefix.
_NAMES = {
    "embedding.word_embeddings": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
}
_LAYER_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc2": "mlp.down_proj",
}
_FUSED = "self_attention.linear_qkv"
_FUSED_PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
_GATED = "mlp.linear_fc1"
_GATED_PARTS = ["mlp.gate_proj", "mlp.up_proj"]


def find_obstacle(model: ModelConfig, attention: AttentionConfig) -> str | None:
    """The first field, with its value, that keeps a model from being a Llama; None: it is one."""
    checks = {
        "attention.kind": (attention.kind, attention.kind in ("mha", "gqa", "mqa")),
        "attention.rotary_dim": (attention.rotary_dim, attention.rotary_width == attention.head_dim),
        "model.normalization": (model.normalization, model.normalization == "rmsnorm"),
        "model.activation": (model.activation, model.activation == "swiglu"),
        # transformers 5 refuses others, although it does not need it.
        "model.hidden_size": (model.hidden_size, model.hidden_size % attention.num_heads == 0),
    }
    return next((f"{field}={value}" for field, (value, fits) in checks.items() if not fits), None)


def llama_config(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """The fields of `LlamaConfig`, for a model without `find_obstacle`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "attention_bias": model.linear_bias,
        "mlp_bias": model.linear_bias,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def to_llama(tensors: NamedTensors, attention: AttentionConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Our whole weights under Llama's names."""
    for name, tensor in tensors:
        module, _, kind = name.rpartition(".")
        if module in _NAMES:
            yield f"{_NAMES[module]}.{kind}", tensor
            continue
        layer, own = module.removeprefix("decoder.layers.").split(".", 1)
        prefix = f"model.layers.{layer}."
        if own in _LAYER_NAMES:
            yield f"{prefix}{_LAYER_NAMES[own]}.{kind}", tensor
        elif own == _FUSED:
            for part, rows in zip(_FUSED_PARTS, split_projection(tensor, attention), strict=True):
                yield f"{prefix}{part}.{kind}", rows
        elif own == _GATED:
            for part, rows in zip(_GATED_PARTS, tensor.chunk(2), strict=True):
                yield f"{prefix}{part}.{kind}", rows
        else:
            raise AssertionError(f"{name} is no weight of a model that is a Llama")


def read_llama_config(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Llama's config as our sections `model` and `attention`.

    Raises:
        FieldError: our model cannot express a field.
    """
    config.refuse_unless("hidden_act", "silu")
    config.refuse_unless("mlp_bias", config.get("attention_bias", False), default=False)
    rotary_base, _ = config.rotary_positions("rope_theta")
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads", None) or heads
    model = {
        **config.sizes(),
        "activation": "swiglu",
        "normalization": "rmsnorm",
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "linear_bias": config.get("attention_bias", False),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "rotary_base": rotary_base,
    }
    attention = {
        "kind": "mha" if groups == heads else "gqa",
        "num_heads": heads,
        "num_kv_heads": groups,
        "head_dim": config.get("head_dim", None) or config.get("hidden_size") // heads,
        "dropout": float(config.get("attention_dropout", 0.0)),
    }
    return model, attention


def from_llama(
    weights: Weights, model: ModelConfig, attention: AttentionConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """A Llama's weights under our names."""
    kinds = ["weight", "bias"] if model.linear_bias else ["weight"]
    for ours, theirs in _NAMES.items():
        if not (model.tie_embeddings and ours == "output_layer"):
            yield f"{ours}.weight", weights[f"{theirs}.weight"]
    for layer in range(model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for own, other in _LAYER_NAMES.items():
            for kind in ["weight"] if "norm" in own else kinds:
                yield f"{ours}{own}.{kind}", weights[f"{theirs}{other}.{kind}"]
        for kind in kinds:
            parts = [weights[f"{theirs}{part}.{kind}"] for part in _FUSED_PARTS]
            yield f"{ours}{_FUSED}.{kind}", fuse_projections(parts, attention)
            gated = [weights[f"{theirs}{part}.{kind}"] for part in _GATED_PARTS]
            yield f"{ours}{_GATED}.{kind}", torch.cat(gated)
