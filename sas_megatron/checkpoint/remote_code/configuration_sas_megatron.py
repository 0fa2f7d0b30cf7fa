"""The config of a model that sas_megatron trained, for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class SASMegatronConfig(PretrainedConfig):
    """The config of a decoder whose attention is SAS or a variant that it is compared with.

    Args:
        attention: The attention's kind and its fields, named as in sas_megatron's configs, with all defaults
            resolved. None for multi-head attention.
        activation: The activation function of the MLP, `swiglu`, `gelu` or `gelu_tanh`.
        normalization: The norm before each block, `rmsnorm` or `layernorm`.
        norm_epsilon: A constant added to the variance in each norm.
        linear_bias: Whether the MLP and the attention's projections have biases.
        parallel_residual: Whether attention and MLP of a layer read the same hidden states.
        rotary_base: θ of the rotary embeddings.
        rotary_scaling: The scaling of the rotary frequencies, `none`, `linear` or `llama3`.
        rotary_scaling_factor: The factor of the scaling.
        rotary_low_frequency_factor: Rotations in the original length below which frequencies are divided.
        rotary_high_frequency_factor: Rotations in the original length above which they are not.
        rotary_original_length: The original length, in tokens.
        cache_simulated_heads: For SAS, whether the KV cache stores simulated heads, which are faster and
            r(E + D)/2D times as large. Otherwise it stores base heads, which are simulated in each step.
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
        parallel_residual: bool = False,
        rotary_scaling: str = "none",
        rotary_scaling_factor: float | None = None,
        rotary_low_frequency_factor: float | None = None,
        rotary_high_frequency_factor: float | None = None,
        rotary_original_length: int | None = None,
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
        self.parallel_residual = parallel_residual
        self.rotary_scaling = rotary_scaling
        self.rotary_scaling_factor = rotary_scaling_factor
        self.rotary_low_frequency_factor = rotary_low_frequency_factor
        self.rotary_high_frequency_factor = rotary_high_frequency_factor
        self.rotary_original_length = rotary_original_length
        self.cache_simulated_heads = cache_simulated_heads
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **options)
        # The base class has no such field from transformers 5 on.
        self.tie_word_embeddings = tie_word_embeddings
