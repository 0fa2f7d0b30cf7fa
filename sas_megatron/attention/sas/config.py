"""SAS, simulated attention scores (arXiv 2507.07694): the config, its rules and its costs; no torch.

The layer itself is in `simulated_layer`, its parts in `head_simulation`, `feature_simulation`,
`aggregation` and `core`. The paper's H, H', D, D' are N, M = r·N, D, E here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.attention_backend import Device
from sas_megatron.config.layer_pass import ActivationSpec
from sas_megatron.config.tensor_group import TensorGroup, Traffic, Weight

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class SimulatedAttentionConfig(AttentionConfig):
    """N query and G key/value heads of D features act as r·N and r·G heads of E query/key features."""

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
    head_expansion: int = Field(default=3, description="r, simulated heads for each base head.")
    simulated_head_dim: int | None = Field(
        default=None,
        description="E, simulated query/key features; null: 1.5·head_dim, or head_dim without them.",
    )
    kernel_size: int = Field(default=3, description="k, width over the features, odd; 1 is the MLP form.")
    simulate_query_heads: bool = Field(default=True, description="Off: the query's heads are repeated.")
    simulate_key_heads: bool = Field(default=True, description="Off: the key's heads are repeated.")
    simulate_value_heads: bool = Field(default=True, description="Off: the value's heads are repeated.")
    simulate_features: bool = Field(default=True, description="Off: queries and keys keep D features.")
    simulation_bias: bool = Field(default=True, description="Biases in all maps of the simulation.")
    initialization: Literal["authors", "identity", "normal"] = Field(
        default="authors",
        description="authors: PyTorch's defaults; identity: starts as the base layer; normal: N(0, σ).",
    )
    exchange: Literal["auto", "gather", "all_to_all"] = Field(
        default="auto", description="How tensor ranks give the simulation all heads; auto weighs the costs."
    )
    kv_cache: Literal["base", "simulated"] = Field(
        default="base",
        description="What decoding keeps of a token. base: the base keys and values, simulated again at each "
        "step; simulated: those that attention reads, r(E + D)/2D times as much and no work again.",
    )

    kernel: Literal["auto", "fused", "plain"] = Field(
        default="auto",
        description="fused: the simulation in Triton kernels, rotary positions included; plain: torch's own "
        "operations; auto: fused on a CUDA device in bfloat16 if the weights fit on chip, otherwise plain.",
    )

    @classmethod
    def defaults_from(cls, base: AttentionConfig, *, hidden_size: int) -> dict[str, Any]:
        """The base's heads and groups, simulated as the defaults say."""
        groups = base.num_key_value_heads
        shared = {} if groups == base.num_heads else {"num_kv_heads": groups}
        return {**super().defaults_from(base, hidden_size=hidden_size), **shared}

    @model_validator(mode="after")
    def _check_simulated(self) -> SimulatedAttentionConfig:
        self.require_positive("head_expansion", "simulated_head_dim", "kernel_size")
        if self.kernel_size % 2 == 0:
            raise self.problem(
                "kernel_size",
                "must be odd, so that the convolution keeps head_dim",
                f"use {self.kernel_size - 1} or {self.kernel_size + 1}",
            )
        if self.simulated_head_dim is not None:
            if not self.simulate_features and self.simulated_head_dim != self.head_dim:
                raise self.problem(
                    "simulated_head_dim",
                    f"must be head_dim={self.head_dim} where attention.simulate_features=false",
                    "leave it out",
                )
            if self.simulated_head_dim < self.head_dim:
                raise self.problem(
                    "simulated_head_dim",
                    f"must be at least attention.head_dim={self.head_dim}",
                    f"use {self.head_dim + self.head_dim // 2}, for example",
                )
        if self.initialization == "identity" and self.rotary_width > self.head_dim:
            raise self.problem(
                "rotary_dim",
                f"must be at most attention.head_dim={self.head_dim} under identity initialization",
                "leave it out",
            )
        return self

    @property
    def query_key_dim(self) -> int:
        """E, with the default filled in: the even width nearest to 1.5·D from above."""
        if self.simulated_head_dim is not None:
            return self.simulated_head_dim
        return -(-3 * self.head_dim // 4) * 2 if self.simulate_features else self.head_dim

    @property
    def rotary_width(self) -> int:
        """Features with rotary positions; all E by default, D under identity initialization."""
        if self.rotary_dim is not None:
            return self.rotary_dim
        return self.head_dim if self.initialization == "identity" else self.query_key_dim

    @property
    def num_simulated_heads(self) -> int:
        """M = r·N."""
        return self.head_expansion * self.num_heads

    @property
    def num_attended_heads(self) -> int:
        """M = r·N: context parallelism shards them r times as far as the base heads."""
        return self.num_simulated_heads

    @property
    def simulates_heads(self) -> bool:
        """Whether any of query, key and value has its heads simulated."""
        return self.simulate_query_heads or self.simulate_key_heads or self.simulate_value_heads

    def head_simulations(self) -> dict[str, int]:
        """Base heads of each head simulation that is on, by name."""
        switches = {
            "query": (self.simulate_query_heads, self.num_heads),
            "key": (self.simulate_key_heads, self.num_key_value_heads),
            "value": (self.simulate_value_heads, self.num_key_value_heads),
        }
        return {name: heads for name, (on, heads) in switches.items() if on}

    def resolved_fields(self) -> dict[str, Any]:
        """With `simulated_head_dim`."""
        return {**super().resolved_fields(), "simulated_head_dim": self.query_key_dim}

    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Terms: qkv, head simulation, feature simulation, projection.

        Head simulation k·(C·rC + (rC)²) + 2rC for each of query (C = N), key and value (C = G);
        feature simulation 2·(D·E + E² + 2E); biases only where simulation_bias is on.
        """
        weights = super().weights(hidden_size, linear_bias=linear_bias)
        for base in self.head_simulations().values():
            simulated, taps = self.head_expansion * base, self.kernel_size
            weights += self._map_weights("head_simulation", base * taps, simulated * taps, simulated)
        if self.simulate_features:
            wide = self.query_key_dim
            weights += 2 * self._map_weights("feature_simulation", self.head_dim, wide, wide)
        return weights

    def _map_weights(self, term: str, expand: int, refine: int, rows: int) -> list[Weight]:
        """Two matrices of so many columns, and their biases; each rank sees the work of its own heads."""
        columns = (expand, refine, 1, 1) if self.simulation_bias else (expand, refine)
        return [Weight(term, rows * width, partial_over="heads", summed_by="layer") for width in columns]

    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """As plain attention, with the exchange that the head simulation needs in place of Megatron-core's
        gathering of few key/value heads.
        """
        if not self.simulates_heads:
            return super().count_tensor_traffic(hidden_size, group)
        from sas_megatron.attention.sas.exchange_choice import exchange_of

        return {
            "qkv": group.into_columns(hidden_size),
            "head_simulation": self.exchange_traffic(exchange_of(self, tensor_parallel=group.ranks), group),
            "projection": group.out_of_rows(hidden_size),
        }

    def exchange_traffic(self, strategy: str, group: TensorGroup) -> Traffic:
        """What the exchange of heads sends by a strategy: of T tokens, on P ranks, with C projected columns,

        gather: (P-1)/P·T·C elements; all_to_all: (P-1)/P²·T·(C + W), where W is the width of what is sent
        home: r·N·D + 2·r·G·D with all heads simulated, without the factor r where one is not, and with P
        in place of G heads a block where G < P, since each rank then gets a copy of the key/value head it
        shares.
        """
        if strategy == "gather":
            return group.gathered(self.qkv_width)
        simulated = self.head_simulations()
        groups = self.num_key_value_heads
        heads_home = sum(
            max(heads, group.ranks) * (self.head_expansion if name in simulated else 1)
            for name, heads in (("query", self.num_heads), ("key", groups), ("value", groups))
        )
        return group.traded(self.qkv_width, width_back=heads_home * self.head_dim)

    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Terms: qkv, head simulation, feature simulation, scores, values, projection.

        Two FLOPs a multiply-add; convolutions with all their taps, padding included; S² scores.
        The mean of the blocks and the ReLUs are not counted, as nowhere else element-wise work is.
        """
        width, wide = self.head_dim, self.query_key_dim
        base_heads = self.num_heads + self.num_key_value_heads
        heads = 0
        for base in self.head_simulations().values():
            simulated = self.head_expansion * base
            heads += 2 * self.kernel_size * simulated * (base + simulated) * width
        features = (
            2 * self.head_expansion * base_heads * wide * (width + wide) if self.simulate_features else 0
        )
        return {
            **self.count_projection_flops(hidden_size),
            "head_simulation": heads,
            "feature_simulation": features,
            "scores": 2 * sequence_length * self.num_simulated_heads * wide,
            "values": 2 * sequence_length * self.num_simulated_heads * width,
        }

    def count_repeated_flops(self, *, device: Device, element_bytes: int) -> dict[str, int]:
        """Of the fused kernels, terms head simulation and feature simulation; padding of tiles not counted.

        Forward, the first convolution is computed for each of the k taps of the second. Backward, it is for
        the gradient of the columns, and for that of the second's weights (with many heads, tap by tap); the
        heads that features are simulated from are, whole; and y is, in two of the features' kernels. (Not
        looked at: heads that came from other ranks by `all_to_all` are kept instead.)
        """
        from sas_megatron.attention.sas.fused.tiling import taps_at_once
        from sas_megatron.attention.sas.kernel_choice import is_fused

        if not is_fused(self, device=device, element_bytes=element_bytes):
            return {}
        taps, width, wide = self.kernel_size, self.head_dim, self.query_key_dim
        heads = 0
        for name, base in self.head_simulations().items():
            many = self.head_expansion * base
            first, second = (2 * taps * many * inputs * width for inputs in (base, many))
            one_by_one = taps // taps_at_once(taps, own=many, every=many)
            forward, backward = taps - 1, 1 + one_by_one
            heads += (forward + backward) * first
            if self.simulate_features and name != "value":
                heads += taps * first + second
        terms = {"head_simulation": heads}
        if self.simulate_features:
            base_heads = self.num_heads + self.num_key_value_heads
            terms["feature_simulation"] = 2 * 2 * self.head_expansion * base_heads * wide * width
        return terms

    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Terms: qkv, the hidden state; head simulation, feature simulation; those of the core attention.

        Where the simulation is recomputed, the projected heads are kept in place of its two terms, in qkv.
        (The mean over the blocks keeps nothing, and its result is the projection's term.)
        """
        from sas_megatron.attention.sas.activations import SimulationPass

        simulation = SimulationPass(self, layer)
        terms = {"qkv": layer.own(hidden_size)}
        if "simulation" in layer.recomputed:
            terms["qkv"] += simulation.count_projected_bytes()
        else:
            if self.simulates_heads:
                terms["head_simulation"] = simulation.count_head_bytes()
            if self.simulate_features:
                terms["feature_simulation"] = simulation.count_feature_bytes()
        terms |= self.count_core_bytes(layer, value_bytes=simulation.count_value_bytes())
        if simulation.is_fused and self.simulate_features:
            # Turned by the kernel, by a table that the model has once.
            del terms["rotary"]
        return terms

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Terms: keys and values, G·D each; under `kv_cache=simulated` r·G·E and r·G·D."""
        base = self.num_key_value_heads
        if self.kv_cache == "base":
            return {"keys": base * self.head_dim, "values": base * self.head_dim}
        simulated = self.head_expansion * base
        return {"keys": simulated * self.query_key_dim, "values": simulated * self.head_dim}

    def build_spec(self) -> ModuleSpec:
        """`SimulatedSelfAttention` with PEAA's mean over r blocks."""
        from sas_megatron.attention.core import build_self_attention_spec
        from sas_megatron.attention.sas.layer import SimulatedSelfAttention
        from sas_megatron.attention.sas.simulation_kernels import check_kernel

        check_kernel(self)
        return build_self_attention_spec(
            self, module=SimulatedSelfAttention, num_blocks=self.head_expansion, attention=self
        )
