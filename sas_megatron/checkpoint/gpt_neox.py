"""Conversion of multi-head models to and from the GPT-NeoX format of transformers, which Pythia has.

The fused projection of GPT-NeoX equals that of Megatron-core with one group per head: the query, key and
value rows of a head are adjacent. Both apply the same rotary embeddings to the first features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sas_megatron.checkpoint.hf_config import HFConfig, rope_scaling_fields
from sas_megatron.checkpoint.llama import check_tied_output, first_obstacle
from sas_megatron.checkpoint.tensor_files import NamedTensors
from sas_megatron.config.attention import MODIFIERS, AttentionConfig
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
_ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def find_neox_obstacle(model: ModelConfig, attention: AttentionConfig) -> str | None:
    """Return the first field, with its value, that GPT-NeoX cannot express; None if there is none."""
    fits = {
        "attention.kind": attention.kind == "mha",
        "attention.head_dim": attention.head_dim * attention.num_heads == model.hidden_size,
        "attention.rotary": attention.rotary == "after",
        **{f"attention.{name}": getattr(attention, name) in (False, "none") for name in MODIFIERS},
        "model.normalization": model.normalization == "layernorm",
        "model.activation": model.activation in _ACTIVATION_NAMES,
        "model.linear_bias": model.linear_bias,
    }
    return first_obstacle(fits, model, attention)


def neox_config(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Return the fields of `GPTNeoXConfig` for a model for which `find_neox_obstacle` returns None."""
    fraction = attention.rotary_width / attention.head_dim
    if int(attention.head_dim * fraction) < attention.rotary_width:
        # transformers rounds the product down, and the quotient may be rounded down as well.
        fraction = math.nextafter(fraction, 1.0)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": attention.num_heads,
        "hidden_act": _ACTIVATION_NAMES[model.activation],
        "layer_norm_eps": model.norm_epsilon,
        "rotary_emb_base": model.rotary_base,
        "rotary_pct": fraction,
        **rope_scaling_fields(model),
        "use_parallel_residual": model.parallel_residual,
        "attention_bias": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def to_neox(tensors: NamedTensors, _attention: AttentionConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert full native weights, of a model for which `find_neox_obstacle` returns None, to GPT-NeoX."""
    for name, tensor in tensors:
        if name in _NAMES:
            yield _NAMES[name], tensor
            continue
        module, _, kind = name.rpartition(".")
        layer, layer_module = module.removeprefix("decoder.layers.").split(".", 1)
        yield f"gpt_neox.layers.{layer}.{_LAYER_NAMES[layer_module]}.{kind}", tensor


def read_neox_config(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the config of a GPT-NeoX to the sections `model` and `attention`.

    Raises:
        FieldError: The native model cannot express a field.
        FileProblem: A field is missing.
    """
    activation = config.read_choice("hidden_act", ACTIVATIONS, default="gelu")
    # The MLP of GPT-NeoX always has biases, and model.linear_bias applies to attention and MLP.
    config.require("attention_bias", True)
    rotary_fields, rotary_fraction = config.read_rotary_embedding(
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
        # `use_parallel_residual` is true in Pythia, and by default.
        "parallel_residual": config.get("use_parallel_residual", True),
        **rotary_fields,
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
