"""The GPT-NeoX format of transformers, as our multi-head model.

Its fused projection is Megatron-core's of as many groups as heads: each head's query, key and value rows
together; and its rotary positions are the same too, on the first features of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sas_megatron.checkpoint.hf_config import HFConfig
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


def read_neox_config(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """A GPT-NeoX's config as our sections `model` and `attention`.

    Raises:
        FieldError: our model cannot express a field.
    """
    # Attention and MLP of the same input; ours are one after the other.
    config.refuse_unless("use_parallel_residual", False, default=True)
    config.refuse_unless("hidden_act", "gelu")
    # Its MLP always has biases, and model.linear_bias is one switch for both.
    config.refuse_unless("attention_bias", True)
    rotary_base, rotary_share = config.rotary_positions(
        "rotary_emb_base", share_field="rotary_pct", share=0.25
    )
    head_dim = config.get("hidden_size") // config.get("num_attention_heads")
    model = {
        **config.sizes(),
        "activation": "gelu",
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
        "rotary_dim": int(head_dim * rotary_share),
        "dropout": float(config.get("attention_dropout", 0.0)),
    }
    return model, attention


def from_neox(
    weights: Mapping[str, torch.Tensor], model: ModelConfig, _attention: AttentionConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """A GPT-NeoX's weights under our names."""
    for ours, theirs in _NAMES.items():
        if not (model.tie_embeddings and ours.startswith("output_layer")):
            yield ours, weights[theirs]
    for layer in range(model.num_layers):
        for ours, theirs in _LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                tensor = weights[f"gpt_neox.layers.{layer}.{theirs}.{kind}"]
                yield f"decoder.layers.{layer}.{ours}.{kind}", tensor
