"""Small random models of transformers, saved as folders, with their logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from sas_megatron.config.loading import read_yaml
from sas_megatron.config.run import RunConfig
from tests.model.model_parts import random_tokens
from tests.run_configs import small_config

SIZES: dict[str, Any] = {
    "vocab_size": 46,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    # Large, so that scores and gates leave their linear range.
    "initializer_range": 0.3,
    "eos_token_id": 1,
    "bos_token_id": None,
}
NEOX = {**SIZES, "use_parallel_residual": False, "rope_parameters": {"rope_type": "default"}}
QWEN = {**SIZES, "num_key_value_heads": 2}
# With three pairs of features, which rotate 10.2, 0.5 and 0.02 times in 64 tokens, so that one frequency is
# kept, one interpolated and one divided.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 0.2,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
LINEAR_SCALING = {"rope_type": "linear", "factor": 4.0}

Model = tuple[str, dict[str, Any]]
PLAIN: dict[str, Model] = {
    "llama": ("Llama", SIZES),
    "llama, grouped": ("Llama", {**SIZES, "num_key_value_heads": 2, "head_dim": 10}),
    "llama, biased and tied": (
        "Llama",
        {
            **SIZES,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    "llama, one group": ("Llama", {**SIZES, "num_key_value_heads": 1}),
    "llama, other rotary base": (
        "Llama",
        # A field of transformers 4, which transformers 5 accepts and saves in `rope_parameters`.
        {**SIZES, "rope_theta": 500.0},
    ),
    "neox": ("GPTNeoX", {**NEOX, "rotary_pct": 1.0}),
    "neox, partly rotary": ("GPTNeoX", {**NEOX, "rotary_pct": 0.7, "layer_norm_eps": 1e-3}),
    "neox, tanh approximation": ("GPTNeoX", {**NEOX, "rotary_pct": 1.0, "hidden_act": "gelu_new"}),
    "neox, tied": ("GPTNeoX", {**NEOX, "rotary_pct": 0.7, "tie_word_embeddings": True}),
}
# Models with parallel residual branches, scaled rotary embeddings, or the biases and norms of Qwen.
FAMILIES: dict[str, Model] = {
    "pythia": ("GPTNeoX", {**NEOX, "use_parallel_residual": True, "rotary_pct": 0.7}),
    "pythia, scaled": (
        "GPTNeoX",
        {**NEOX, "use_parallel_residual": True, "rotary_pct": 1.0, "rope_parameters": LLAMA3_SCALING},
    ),
    "llama 3.1, grouped": (
        "Llama",
        {**SIZES, "num_key_value_heads": 2, "rope_parameters": LLAMA3_SCALING},
    ),
    "llama, linearly scaled": ("Llama", {**SIZES, "rope_scaling": LINEAR_SCALING}),
    "qwen2, grouped": ("Qwen2", QWEN),
    "qwen2, tied": ("Qwen2", {**SIZES, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3, grouped": ("Qwen3", {**QWEN, "head_dim": 10}),
    "qwen3, grouped and scaled": ("Qwen3", {**QWEN, "head_dim": 6, "rope_parameters": LINEAR_SCALING}),
}
MODELS = {**PLAIN, **FAMILIES}

# ⌊0.7·6⌋ of the 6 features are rotated.
ROTARY_WIDTHS = {"neox, partly rotary": 4, "neox, tied": 4, "pythia": 4}


@torch.no_grad()
def save_random_model(name: str, folder: Path) -> torch.Tensor:
    """Save a random transformers model in float64 and return its logits for `random_tokens`."""
    import transformers

    family, fields = MODELS[name]
    torch.manual_seed(3)
    # A copy, because transformers sets missing fields in place.
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(fields))
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")
    return logits_in_float64(model)


@torch.no_grad()
def logits_in_float64(model: Any) -> torch.Tensor:
    """Return the logits of a model in float64 for `random_tokens`."""
    for module in model.modules():
        # The norms of Llama and Qwen in transformers compute in float32 for models of any type.
        if hasattr(module, "variance_epsilon"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon).double()
            norm.weight = module.weight
            module.forward = norm.forward
    logits: torch.Tensor = model(random_tokens(config_of_vocabulary()), use_cache=False).logits
    return logits


def config_of_vocabulary() -> RunConfig:
    """Return a config with the vocabulary of `SIZES`."""
    return small_config(model={"vocab_size": 46, "vocab_multiple": 2})


def config_of(folder: Path, **sections: Any) -> RunConfig:
    """Return a config with the sections that an import wrote."""
    written = read_yaml(folder / "model.yaml")
    return small_config(**{**written, **sections})
