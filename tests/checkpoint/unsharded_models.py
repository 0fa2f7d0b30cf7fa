"""Unsharded models for tests of checkpoints: their weights by global name, and their logits."""

from __future__ import annotations

from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.model.model_parts import perturb_weights, random_tokens, weight_parts
from tests.rank_pool import in_layout

ATTENTIONS: dict[str, small.Attention] = {
    "mha": small.MHA,
    "gqa": small.GQA,
    "gqa-partly-rotary": {**small.GQA, "rotary_dim": 4},
    "mqa": small.MQA,
    "mla": {**small.MLA, "value_head_dim": 5},
    "mla-whole-queries": small.MLA_UNCOMPRESSED_QUERIES,
    **{
        f"{name}-modified": {**small.MODIFIERS, **attention}
        for name, attention in (
            ("mha", {**small.MHA, "output_gate": "headwise"}),
            ("diff", small.DIFF_GROUPED),
            ("mla", {**small.MLA, "value_head_dim": 5}),
            ("tpa", {**small.TPA, "initialization": "normal"}),
            ("sas", small.SAS_GROUPED),
        )
    },
    "mfa": small.MFA,
    "tpa": {**small.TPA, "initialization": "normal"},
    "tpa-kv": small.TPA_UNFACTORED_QUERIES,
    "sas": small.SAS,
    "sas-grouped": {
        **small.SAS_GROUPED,
        "head_expansion": 2,
        "kernel_size": 5,
        "simulation_bias": False,
        "rotary_dim": 8,
    },
    "sas-before": {
        **small.SAS_GROUPED,
        "rotary": "before",
        "head_activation": "gelu",
        "feature_activation": "none",
        "aggregation": "rsqrt",
    },
    "mla-unrotated": {**small.MLA, "rotary": "none"},
    "gqa-window": {**small.GQA, "window_size": 5},
    "sas-window": {**small.SAS_GROUPED, "window_size": 4, "window_pattern": ["full", "window"]},
    "sas-partly": {**small.SAS, "simulate_key_heads": False, "simulate_features": False},
}
# Settings of the rest of the model. With the first, the Llama format can express mha, gqa and mqa.
PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {
        "linear_bias": True,
        "activation": "gelu",
        "normalization": "layernorm",
        "tie_embeddings": True,
        "rotary_base": 500,
    },
}


def build_unsharded_weights(config: RunConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return full weights of a newly built model after `perturb_weights`. Runs on a pool of one rank."""
    from sas_megatron.model.assembly import build_gpt_chunks

    in_layout(config.parallel)
    model_chunks = build_gpt_chunks(config, dtype=dtype)
    for model_chunk in model_chunks:
        perturb_weights(model_chunk)
    return {name: part.tensor for name, part in weight_parts(model_chunks).items()}


@torch.no_grad()
def compute_logits(weights: dict[str, torch.Tensor], config: RunConfig) -> torch.Tensor:
    """Return the logits [B, S, V] of full weights, with the padded vocabulary. Runs on a pool of one rank."""
    from sas_megatron.model.assembly import build_gpt_chunks
    from sas_megatron.model.initialization import global_name

    in_layout(config.parallel)
    dtype = weights["embedding.word_embeddings.weight"].dtype
    (model,) = build_gpt_chunks(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[global_name(model, name)])
    tokens = random_tokens(config)
    logits: torch.Tensor = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    return logits
