"""Conversion of models in the GPT-NeoX format of transformers to multi-head models.

The fused projection of GPT-NeoX equals that of Megatron-core with one group per head: the query, key and
value rows of a head are adjacent. Both apply the same rotary embeddings to the first features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sas_megatron.checkpoint.hf_config import HFConfig
from sas_megatron.checkpoint.llama import check_tied_output
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.model import ModelConfig

_NAMES = {
    "embedding.word_embeddings.weight": "gpt_neox.embed_in.weight",
    "decoder.final_layernorm.weight": "gpt_neox.final_layer_norm.weight",
    "decoder.final_layernorm.bias": "gpt_neox.final_layer_norm.bias",
    "output_layer.weight": "embed_out.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.dense",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_fc1": "mlp.dense_h_to_4h",
    "mlp.linear_fc2": "mlp.dense_4h_to_h",
}

# hidden_act -> model.activation; transformers has several names of the tanh approximation.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def read_neox_config(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the config of a GPT-NeoX to the sections `model` and `attention`.

    Raises:
        FieldError: The native model cannot express a field.
        FileProblem: A field is missing.
    """
    # With a parallel residual, attention and MLP read the same input; the native MLP follows the attention.
    config.require("use_parallel_residual", False, default=True)
    activation = config.read_choice("hidden_act", ACTIVATIONS, default="gelu")
    # The MLP of GPT-NeoX always has biases, and model.linear_bias applies to attention and MLP.
    config.require("attention_bias", True)
    rotary_base, rotary_fraction = config.read_rotary_embedding(
        "rotary_emb_base", fraction_field="rotary_pct", default_fraction=0.25
    )
    head_dim = config.get("hidden_size") // config.get("num_attention_heads")
    model = {
        **config.read_sizes(),
        "activation": activation,
        "normalization": "layernorm",
        "norm_epsilon": float(config.get("layer_norm_eps", 1e-5)),
        "linear_bias": True,
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "hidden_dropout": float(config.get("hidden_dropout", 0.0)),
        "rotary_base": rotary_base,
    }
    attention = {
        "kind": "mha",
        "num_heads": config.get("num_attention_heads"),
        "head_dim": head_dim,
        "rotary_dim": int(head_dim * rotary_fraction),
        "dropout": float(config.get("attention_dropout", 0.0)),
    }
    return model, attention


def neox_shapes(model: ModelConfig, attention: AttentionConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the GPT-NeoX weights of a model by name."""
    hidden, outer, width = model.hidden_size, model.ffn_hidden_size, attention.num_heads * attention.head_dim
    table = (model.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": table, "embed_out.weight": table}
    for kind in ("weight", "bias"):
        shapes[f"gpt_neox.final_layer_norm.{kind}"] = (hidden,)
    modules: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "attention.query_key_value": (3 * width, hidden),
        "attention.dense": (hidden, width),
        "mlp.dense_h_to_4h": (outer, hidden),
        "mlp.dense_4h_to_h": (hidden, outer),
    }
    for layer in range(model.num_layers):
        for name, shape in modules.items():
            shapes[f"gpt_neox.layers.{layer}.{name}.weight"] = shape
            shapes[f"gpt_neox.layers.{layer}.{name}.bias"] = shape[:1]
    return shapes


def from_neox(
    weights: Mapping[str, torch.Tensor], model: ModelConfig, _attention: AttentionConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert GPT-NeoX weights to full native weights."""
    for native, neox in _NAMES.items():
        if not (model.tie_embeddings and native.startswith("output_layer")):
            yield native, weights[neox]
    if model.tie_embeddings:
        check_tied_output(weights, embedding="gpt_neox.embed_in.weight", output="embed_out.weight")
    for layer in range(model.num_layers):
        for native, neox in _LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                tensor = weights[f"gpt_neox.layers.{layer}.{neox}.{kind}"]
                yield f"decoder.layers.{layer}.{native}.{kind}", tensor
