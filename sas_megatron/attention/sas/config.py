"""Config of SAS, simulated attention scores (arXiv 2507.07694). No torch.

The paper's H, H', D, D' are N, M = r·N, D, E here. `simulated_attention` has the operator.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from sas_megatron.config.attention import AttentionConfig, InitialWeights


class SimulatedAttentionConfig(AttentionConfig):
    """N query and G key/value heads of D features act as r·N and r·G heads of E query/key features."""

    supports_qkv_bias: ClassVar[bool] = True
    rotary_choices: ClassVar[tuple[str, ...]] = ("after", "before", "none")
    recomputable: ClassVar[dict[str, tuple[str, ...]]] = {
        **AttentionConfig.recomputable,
        "simulation": ("head_simulation", "feature_simulation"),
    }
    dimension_steps: ClassVar[dict[str, int]] = {
        **AttentionConfig.dimension_steps,
        "num_kv_heads": 1,
        "head_expansion": 1,
        "simulated_head_dim": 8,
    }
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_kv_heads", "head_dim")

    kind: Literal["sas"] = Field(default="sas", description="Simulated attention scores.")
    head_expansion: int = Field(default=3, description="r, the number of simulated heads per base head.")
    simulated_head_dim: int | None = Field(
        default=None,
        description="E, simulated query/key features; null: 1.5·head_dim, or head_dim without feature "
        "simulation.",
    )
    kernel_size: int = Field(
        default=3,
        description="k, taps of the convolutions over the features, odd; 1 is the paper's MLP form.",
    )
    simulate_query_heads: bool = Field(default=True, description="false: the query's heads are repeated.")
    simulate_key_heads: bool = Field(default=True, description="false: the key's heads are repeated.")
    simulate_value_heads: bool = Field(default=True, description="false: the value's heads are repeated.")
    simulate_features: bool = Field(default=True, description="false: queries and keys have D features.")
    simulation_bias: bool = Field(default=True, description="Biases in all maps of the simulation.")
    head_activation: Literal["relu", "gelu", "none"] = Field(
        default="relu",
        description="Activation function between the convolutions of the head simulation; none: linear.",
    )
    feature_activation: Literal["relu", "gelu", "none"] = Field(
        default="relu",
        description="Activation function between the maps of the feature simulation; none: linear.",
    )
    aggregation: Literal["mean", "rsqrt"] = Field(
        default="mean",
        description="How the r blocks of heads are aggregated. mean: sum/r, as in the paper; rsqrt: sum/√r.",
    )
    initialization: Literal["authors", "identity", "normal"] = Field(
        default="authors",
        description="authors: PyTorch's defaults; identity: starts as the base layer; "
        "normal: N(0, 1/fan_in).",
    )
    output_initialization: Literal["scaled", "torch"] = Field(
        default="scaled",
        description="Initialization of the output projection. scaled: by model.output_init; torch: PyTorch's "
        "default, uniform in ±1/√(N·D), as in the authors' module.",
    )
    exchange: Literal["auto", "gather", "all_to_all"] = Field(
        default="auto",
        description="How tensor ranks exchange heads for the simulation; auto estimates the cheaper way.",
    )
    kv_cache: Literal["base", "simulated"] = Field(
        default="base",
        description="Tensors in the KV cache. base: base keys and values, which are simulated again in each "
        "step; simulated: simulated keys and values, r(E + D)/2D times as large, without recomputation.",
    )

    kernel: Literal["auto", "fused", "plain"] = Field(
        default="auto",
        description="fused: simulation and rotary embeddings in Triton kernels; plain: torch's operations; "
        "auto: fused on a CUDA device in bfloat16 if the weights fit in shared memory, otherwise plain.",
    )

    @override
    def initial_weights(self, name: str, full_shape: tuple[int, ...]) -> InitialWeights | None:
        if name == "linear_proj.weight" and self.output_initialization == "torch":
            return InitialWeights("uniform", 1 / math.sqrt(full_shape[1]))
        return None

    @model_validator(mode="after")
    def _check_simulated(self) -> SimulatedAttentionConfig:
        self.require_positive("head_expansion", "simulated_head_dim", "kernel_size")
        if self.kernel_size % 2 == 0:
            raise self.problem(
                "kernel_size",
                "must be odd, so that the convolution preserves head_dim",
                f"use {self.kernel_size - 1} or {self.kernel_size + 1}",
                (f"attention.kernel_size={self.kernel_size + 1}",),
            )
        if self.simulated_head_dim is not None:
            if not self.simulate_features and self.simulated_head_dim != self.head_dim:
                raise self.problem(
                    "simulated_head_dim",
                    f"must be head_dim={self.head_dim} if attention.simulate_features=false",
                    "omit it",
                    ("attention.simulated_head_dim=null",),
                )
            if self.simulated_head_dim < self.head_dim:
                raise self.problem(
                    "simulated_head_dim",
                    f"must be at least attention.head_dim={self.head_dim}",
                    f"use {self.head_dim + self.head_dim // 2}, for example",
                    ("attention.simulated_head_dim=null",),
                )
        if self.kernel == "fused" and self.unfusable_field is not None:
            raise self.problem(
                "kernel",
                f"does not support {self.unfusable_field}",
                "use auto or plain",
                ("attention.kernel=auto",),
            )
        if self.initialization == "identity" and self.aggregation != "mean":
            raise self.problem(
                "aggregation",
                "must be mean with identity initialization, since the layer starts as the base layer",
                "omit it",
                ("attention.aggregation=mean",),
            )
        if self.initialization == "identity" and self.qk_norm and self.query_key_dim > self.head_dim:
            raise self.problem(
                "qk_norm",
                f"must be false with identity initialization, since norms of {self.query_key_dim} features "
                f"differ from those of {self.head_dim}",
                f"set attention.simulated_head_dim={self.head_dim}, or another initialization",
                (f"attention.simulated_head_dim={self.head_dim}",),
            )
        if self.initialization == "identity" and self.rotary_width > self.head_dim:
            raise self.problem(
                "rotary_dim",
                f"must be at most attention.head_dim={self.head_dim} with identity initialization",
                "omit it",
                ("attention.rotary_dim=null",),
            )
        return self

    @property
    @override
    def query_key_dim(self) -> int:
        """E, with its default resolved: the smallest even width of at least 1.5·D."""
        if self.simulated_head_dim is not None:
            return self.simulated_head_dim
        return -(-3 * self.head_dim // 4) * 2 if self.simulate_features else self.head_dim

    @property
    @override
    def rotary_width(self) -> int:
        """Features with rotary embeddings: by default E, and D with `before` or identity initialization."""
        if self.rotary == "after" and self.rotary_dim is None and self.initialization == "identity":
            return self.head_dim
        return super().rotary_width

    @property
    def num_simulated_heads(self) -> int:
        """M = r·N."""
        return self.head_expansion * self.num_heads

    @property
    @override
    def num_attended_heads(self) -> int:
        """M = r·N, which context parallelism shards."""
        return self.num_simulated_heads

    @property
    def simulates_heads(self) -> bool:
        """Whether the heads of query, key or value are simulated."""
        return self.simulate_query_heads or self.simulate_key_heads or self.simulate_value_heads

    @property
    def unfusable_field(self) -> str | None:
        """The first field that the fused kernels do not support, as `attention.field=value`, if any."""
        supported = {"rotary": self.rotary != "before"}
        if self.simulates_heads:
            supported["head_activation"] = self.head_activation == "relu"
        if self.simulate_features:
            supported["feature_activation"] = self.feature_activation == "relu"
        found = next((name for name, is_supported in supported.items() if not is_supported), None)
        return None if found is None else f"attention.{found}={getattr(self, found)}"

    def head_simulations(self) -> dict[str, int]:
        """Return the base heads of each head simulation that is on, by `query`, `key` and `value`."""
        switches = {
            "query": (self.simulate_query_heads, self.num_heads),
            "key": (self.simulate_key_heads, self.num_key_value_heads),
            "value": (self.simulate_value_heads, self.num_key_value_heads),
        }
        return {name: heads for name, (is_on, heads) in switches.items() if is_on}

    @override
    def resolved_fields(self) -> dict[str, Any]:
        return {**super().resolved_fields(), "simulated_head_dim": self.query_key_dim}
