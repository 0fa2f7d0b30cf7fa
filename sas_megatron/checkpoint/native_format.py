"""The config of an exported model that needs this package's code, from ours and back."""

from __future__ import annotations

from typing import Any

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.checkpoint.architecture import describe_architecture
from sas_megatron.checkpoint.hf_config import HFConfig
from sas_megatron.config.attention import KINDS, AttentionConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.model import ModelConfig

# Fields of our section `model` -> of `SASMegatronConfig`.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "activation": "activation",
    "normalization": "normalization",
    "norm_epsilon": "norm_epsilon",
    "linear_bias": "linear_bias",
    "rotary_base": "rotary_base",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}


def native_config(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """The fields of `SASMegatronConfig`, and where its code is.

    Raises:
        FieldError: the attention is not one of this package's own, so its code is not there.
    """
    if attention.kind not in KINDS:
        raise FieldError(
            "attention.kind",
            attention.kind,
            "is not one of this package's own, whose code an export brings along",
            f"export one of {', '.join(KINDS)}",
        )
    return {
        "architectures": ["SASMegatronForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sas_megatron.SASMegatronConfig",
            "AutoModelForCausalLM": "modeling_sas_megatron.SASMegatronForCausalLM",
        },
        "model_type": "sas_megatron",
        **{theirs: getattr(model, ours) for ours, theirs in _FIELDS.items()},
        "num_attention_heads": attention.num_heads,
        "attention": describe_architecture(model, attention)["attention"],
        "cache_simulated_heads": isinstance(attention, SimulatedAttentionConfig)
        and attention.kv_cache == "simulated",
    }


def read_native_config(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our sections `model` and `attention`."""
    return {ours: config.get(theirs) for ours, theirs in _FIELDS.items()}, config.get("attention")
