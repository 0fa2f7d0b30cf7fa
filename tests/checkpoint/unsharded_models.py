"""Unsharded models for tests of checkpoints: their weights by global name, and their logits."""

from __future__ import annotations

from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.evaluation.trained_models import gather_logits
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
    """Return the logits [B, S, V] of full weights for `random_tokens`, with the padded vocabulary."""
    model = _build_model(weights, config)
    tokens = random_tokens(config)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits: torch.Tensor = model(tokens, positions, None, runtime_gather_output=True)
    return logits


@torch.no_grad()
def decode_logits(weights: dict[str, torch.Tensor], config: RunConfig) -> torch.Tensor:
    """Return the same logits, computed with a KV cache: five tokens, then one at a time."""
    from sas_megatron.evaluation.trained_model import TrainedModel

    model: Any = TrainedModel(config, _build_model(weights, config), None, in_layout(config.parallel), step=0)
    tokens = random_tokens(config)
    cache = model.new_cache(len(tokens), max_tokens=tokens.shape[1])
    passes = []
    for new in tokens.split([5] + [1] * (tokens.shape[1] - 5), dim=1):
        cache.begin_pass(new.shape[1])
        passes.append(gather_logits(model, model.hidden_states(new, cache)))
        cache.end_pass([new.shape[1]] * len(tokens))
    return torch.cat(passes).transpose(0, 1)


def _build_model(weights: dict[str, torch.Tensor], config: RunConfig) -> Any:
    """Build this rank's model from full weights, without pipeline parallelism."""
    from sas_megatron.model.assembly import build_gpt_chunks
    from sas_megatron.model.initialization import global_name, tensor_parallel_shard

    in_layout(config.parallel)
    dtype = weights["embedding.word_embeddings.weight"].dtype
    (model,) = build_gpt_chunks(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.copy_(tensor_parallel_shard(weights[global_name(model, name)], parameter))
    return model
