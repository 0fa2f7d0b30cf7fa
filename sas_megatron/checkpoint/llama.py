"""Conversion of multi-head and grouped-query models to and from the Llama format of transformers.

Both formats apply rotary embeddings to the same pairs of features, which are half a head apart. The formats
of Qwen (`qwen.py`) have the names of Llama's weights; their further weights are converted here as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sas_megatron.checkpoint.hf_config import HFConfig, rope_scaling_fields
from sas_megatron.checkpoint.tensor_files import NamedTensors
from sas_megatron.config.attention import MODIFIERS, AttentionConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.model import ModelConfig

Weights = Mapping[str, torch.Tensor]

# Native names -> Llama names of modules whose tensors are equal. Names of layers' modules follow the layer's
# prefix.
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
# The scales of QK-norm, parameters of their own in the native model.
_NORM_NAMES = {
    "self_attention.core_attention.modifiers.query_norm": "self_attn.q_norm.weight",
    "self_attention.core_attention.modifiers.key_norm": "self_attn.k_norm.weight",
}
_FUSED = "self_attention.linear_qkv"
_FUSED_PARTS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
_GATED = "mlp.linear_fc1"
_GATED_PARTS = ["mlp.gate_proj", "mlp.up_proj"]


def find_obstacle(model: ModelConfig, attention: AttentionConfig) -> str | None:
    """Return the first field, with its value, that the Llama format cannot express; None if there is none."""
    fits = {
        **check_llama_layers(model, attention),
        "attention.qkv_bias": not attention.qkv_bias,
        "attention.qk_norm": not attention.qk_norm,
        # transformers 5 rejects sizes that num_heads does not divide, although its Llama could compute them.
        "model.hidden_size": model.hidden_size % attention.num_heads == 0,
    }
    return first_obstacle(fits, model, attention)


def check_llama_layers(model: ModelConfig, attention: AttentionConfig) -> dict[str, bool]:
    """Return for each field whether the layers that Llama and Qwen share can express its value."""
    others = [name for name in MODIFIERS if name != "qk_norm"]
    return {
        "attention.kind": attention.kind in ("mha", "gqa", "mqa"),
        "attention.rotary": attention.rotary == "after",
        "attention.rotary_dim": attention.rotary_width == attention.head_dim,
        **{f"attention.{name}": getattr(attention, name) in (False, "none") for name in others},
        "model.normalization": model.normalization == "rmsnorm",
        "model.activation": model.activation == "swiglu",
        "model.parallel_residual": not model.parallel_residual,
    }


def first_obstacle(fits: Mapping[str, bool], model: ModelConfig, attention: AttentionConfig) -> str | None:
    """Return the first field that does not fit a format, with its value; None if all fit.

    Args:
        fits: For each dotted field, whether the format can express its value.
        model: The section `model`.
        attention: The section `attention`.
    """
    sections: dict[str, ModelConfig | AttentionConfig] = {"model": model, "attention": attention}
    for path, does_fit in fits.items():
        section, _, field = path.partition(".")
        if not does_fit:
            return f"{path}={getattr(sections[section], field)}"
    return None


def llama_config(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Return the fields of `LlamaConfig` for a model for which `find_obstacle` returns None."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **common_llama_fields(model, attention),
        "attention_bias": model.linear_bias,
        "mlp_bias": model.linear_bias,
    }


def common_llama_fields(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Return the fields that `LlamaConfig` and the configs of Qwen share."""
    return {
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
        **rope_scaling_fields(model),
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def to_llama(tensors: NamedTensors, attention: AttentionConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert full native weights, of a model that Llama's or Qwen's format can express, to Llama's names."""
    for name, tensor in tensors:
        module, _, kind = name.rpartition(".")
        if module in _NAMES:
            yield f"{_NAMES[module]}.{kind}", tensor
            continue
        layer, layer_module = module.removeprefix("decoder.layers.").split(".", 1)
        prefix = f"model.layers.{layer}."
        if f"{layer_module}.{kind}" in _NORM_NAMES:
            yield f"{prefix}{_NORM_NAMES[f'{layer_module}.{kind}']}", tensor
        elif layer_module in _LAYER_NAMES:
            yield f"{prefix}{_LAYER_NAMES[layer_module]}.{kind}", tensor
        elif layer_module == _FUSED:
            for part, rows in zip(_FUSED_PARTS, split_projection(tensor, attention), strict=True):
                yield f"{prefix}{part}.{kind}", rows
        elif layer_module == _GATED:
            for part, rows in zip(_GATED_PARTS, tensor.chunk(2), strict=True):
                yield f"{prefix}{part}.{kind}", rows
        else:
            raise AssertionError(f"{name} has no counterpart in the Llama format")


def read_llama_config(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the config of a Llama to the sections `model` and `attention`.

    Raises:
        FieldError: The native model cannot express a field.
        FileProblem: A field is missing.
    """
    has_bias = config.get("attention_bias", False)
    config.require("mlp_bias", has_bias, default=False)
    model, attention = read_llama_layers(config)
    return {**model, "linear_bias": has_bias}, attention


def read_llama_layers(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the fields that `LlamaConfig` and the configs of Qwen share, without those of biases.

    Raises:
        FieldError: The native model cannot express a field.
        FileProblem: A field is missing.
    """
    config.require("hidden_act", "silu")
    rotary_fields, _ = config.read_rotary_embedding("rope_theta")
    heads = config.get("num_attention_heads")
    groups = config.get("num_key_value_heads", None) or heads
    model = {
        **config.read_sizes(),
        "activation": "swiglu",
        "normalization": "rmsnorm",
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        **rotary_fields,
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
    """Convert Llama weights, or weights of Qwen, to full native weights."""
    kinds = ["weight", "bias"] if model.linear_bias else ["weight"]
    fused_kinds = ["weight", "bias"] if model.linear_bias or attention.qkv_bias else ["weight"]
    for native, llama in _NAMES.items():
        if not (model.tie_embeddings and native == "output_layer"):
            yield f"{native}.weight", weights[f"{llama}.weight"]
    if model.tie_embeddings:
        check_tied_output(weights, embedding="model.embed_tokens.weight", output="lm_head.weight")
    for layer in range(model.num_layers):
        prefix, llama_prefix = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for native, llama in _LAYER_NAMES.items():
            for kind in ["weight"] if "norm" in native else kinds:
                yield f"{prefix}{native}.{kind}", weights[f"{llama_prefix}{llama}.{kind}"]
        for native, llama in _NORM_NAMES.items() if attention.qk_norm else ():
            yield f"{prefix}{native}", weights[f"{llama_prefix}{llama}"]
        for kind in fused_kinds:
            parts = [weights[f"{llama_prefix}{part}.{kind}"] for part in _FUSED_PARTS]
            yield f"{prefix}{_FUSED}.{kind}", fuse_projections(parts, attention)
        for kind in kinds:
            gated = [weights[f"{llama_prefix}{part}.{kind}"] for part in _GATED_PARTS]
            yield f"{prefix}{_GATED}.{kind}", torch.cat(gated)


def llama_shapes(model: ModelConfig, attention: AttentionConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's Llama weights by name, with biases and norms that it may have."""
    hidden, outer = model.hidden_size, model.ffn_hidden_size
    width, group_width = (
        heads * attention.head_dim for heads in (attention.num_heads, attention.num_key_value_heads)
    )
    table = (model.vocab_size, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": (hidden,),
    }
    matrices = {
        "self_attn.q_proj": (width, hidden),
        "self_attn.k_proj": (group_width, hidden),
        "self_attn.v_proj": (group_width, hidden),
        "self_attn.o_proj": (hidden, width),
        "mlp.gate_proj": (outer, hidden),
        "mlp.up_proj": (outer, hidden),
        "mlp.down_proj": (hidden, outer),
    }
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        for name in _NORM_NAMES.values():
            shapes[f"{prefix}{name}"] = (attention.head_dim,)
        for name, shape in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes


def check_tied_output(weights: Weights, *, embedding: str, output: str) -> None:
    """Check that a stored output layer of a model with tied embeddings is the embedding; it may be missing.

    Raises:
        FieldError: The output layer differs from the embedding.
    """
    if output in weights and not torch.equal(weights[output], weights[embedding]):
        raise FieldError(
            "tie_word_embeddings",
            True,
            f"means that {output} equals {embedding}, but the stored tensors differ",
            "set tie_word_embeddings to false in the model's config.json",
        )


def split_projection(fused: torch.Tensor, attention: AttentionConfig) -> list[torch.Tensor]:
    """Split Megatron-core's fused query, key and value projection into three projections.

    Args:
        fused: [(N + 2G)·D, …], whose rows are grouped: the queries of a group, its key and its value.
        attention: Config with N, G and D.

    Returns:
        Query [N·D, …], key [G·D, …] and value [G·D, …].
    """
    num_groups = attention.num_key_value_heads
    queries_per_group = attention.num_heads // num_groups
    by_group = fused.unflatten(0, (num_groups, queries_per_group + 2, attention.head_dim))
    return [part.flatten(0, 2) for part in by_group.split([queries_per_group, 1, 1], dim=1)]


def fuse_projections(parts: Sequence[torch.Tensor], attention: AttentionConfig) -> torch.Tensor:
    """Fuse the query, key and value projections. This is the inverse of `split_projection`."""
    num_groups, head_dim = attention.num_key_value_heads, attention.head_dim
    by_group = [part.unflatten(0, (num_groups, -1, head_dim)) for part in parts]
    return torch.cat(by_group, dim=1).flatten(0, 2)
