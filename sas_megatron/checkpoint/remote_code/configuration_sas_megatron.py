"""The config of a model that sas_megatron trained, for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class SASMegatronConfig(PretrainedConfig):
    """Sizes and parts of a decoder whose attention is SAS or one that it is compared with.

    Args:
        attention: The kind of attention and its fields, by the names of sas_megatron's configs, with all
            defaults filled in. Without it, multi-head attention.
        activation: `swiglu` or `gelu`, of the MLP.
        normalization: `rmsnorm` or `layernorm`, before each block.
        norm_epsilon: Added to the variance in each norm.
        linear_bias: Whether the MLP and the attention's projections have biases.
        rotary_base: θ of the rotary positions.
        cache_simulated_heads: Of SAS, what decoding keeps of a token. Off: its base heads, which are
            simulated again at each step, as sas_megatron counts the cache. On: the simulated ones,
            r(E + D)/2D times as large, and faster.
    """

    model_type = "sas_megatron"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 2048,
        attention: dict[str, Any] | None = None,
        activation: str = "swiglu",
        normalization: str = "rmsnorm",
        norm_epsilon: float = 1e-5,
        linear_bias: bool = False,
        rotary_base: int = 10000,
        cache_simulated_heads: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        **options: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        head_dim = hidden_size // num_attention_heads
        self.attention = attention or {
            "kind": "mha",
            "num_heads": num_attention_heads,
            "num_kv_heads": num_attention_heads,
            "head_dim": head_dim,
            "rotary_dim": head_dim,
        }
        self.activation = activation
        self.normalization = normalization
        self.norm_epsilon = norm_epsilon
        self.linear_bias = linear_bias
        self.rotary_base = rotary_base
        self.cache_simulated_heads = cache_simulated_heads
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **options)
        # In transformers 5 no longer a field of the base.
        self.tie_word_embeddings = tie_word_embeddings
