"""Folders of tiny Llama and GPT-NeoX models, written without transformers."""

from __future__ import annotations

import json
from typing import Any

from tests.fuzzing.inputs import Files

SIZES: dict[str, Any] = {
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LLAMA: dict[str, Any] = {
    **SIZES,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
}
NEOX: dict[str, Any] = {
    **SIZES,
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "use_parallel_residual": False,
    "hidden_act": "gelu",
    "attention_bias": True,
    "layer_norm_eps": 1e-5,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
}


def small_models() -> dict[str, Files]:
    """Return the files of a Llama in two files of weights, and of a GPT-NeoX."""
    import safetensors.torch
    import torch

    def save(shapes: dict[str, tuple[int, ...]]) -> bytes:
        return bytes(safetensors.torch.save({name: torch.ones(shape) for name, shape in shapes.items()}))

    layer = "model.layers.0."
    first = {"model.embed_tokens.weight": (10, 8), "lm_head.weight": (10, 8), "model.norm.weight": (8,)}
    second = {
        **{f"{layer}{name}layernorm.weight": (8,) for name in ("input_", "post_attention_")},
        f"{layer}self_attn.q_proj.weight": (8, 8),
        f"{layer}self_attn.k_proj.weight": (4, 8),
        f"{layer}self_attn.v_proj.weight": (4, 8),
        f"{layer}self_attn.o_proj.weight": (8, 8),
        f"{layer}mlp.gate_proj.weight": (6, 8),
        f"{layer}mlp.up_proj.weight": (6, 8),
        f"{layer}mlp.down_proj.weight": (8, 6),
    }
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = {"weight_map": dict.fromkeys(first, names[0]) | dict.fromkeys(second, names[1])}
    layer = "gpt_neox.layers.0."
    matrices = {
        "attention.query_key_value": (24, 8),
        "attention.dense": (8, 8),
        "mlp.dense_h_to_4h": (6, 8),
        "mlp.dense_4h_to_h": (8, 6),
    }
    norms = (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "gpt_neox.final_layer_norm")
    neox: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (10, 8), "embed_out.weight": (10, 8)}
    for norm in norms:
        neox |= {f"{norm}.weight": (8,), f"{norm}.bias": (8,)}
    for name, shape in matrices.items():
        neox |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
    return {
        "llama": {
            "config.json": json.dumps(LLAMA).encode(),
            names[0]: save(first),
            names[1]: save(second),
            "model.safetensors.index.json": json.dumps(index).encode(),
        },
        "neox": {"config.json": json.dumps(NEOX).encode(), "model.safetensors": save(neox)},
    }
