"""Multi-head latent attention, MLA (DeepSeek-V2, arXiv 2405.04434): the config and its costs; no torch.

The paper's n_h, d_h, d_h^R, d_c, d_c' are num_heads N, head_dim D, rotary_head_dim R, kv_lora_rank and
query_lora_rank here; V is the width of a value head, d_h in the paper. The layer is in `latent_layer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.layer_pass import ActivationSpec
from sas_megatron.config.tensor_group import GRADIENT_BYTES, TensorGroup, Traffic, Weight

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig


class LatentAttentionConfig(AttentionConfig):
    """Keys and values are read from one narrow latent a token, and all heads share one rotary key."""

    uses_model_rotary: ClassVar[bool] = False
    dimension_steps: ClassVar[dict[str, int]] = {
        **AttentionConfig.dimension_steps,
        "rotary_head_dim": 8,
        "value_head_dim": 8,
        "kv_lora_rank": 8,
        "query_lora_rank": 8,
    }
    cache_dimensions: ClassVar[tuple[str, ...]] = ("kv_lora_rank",)

    kind: Literal["mla"] = Field(default="mla", description="Multi-head latent attention.")
    head_dim: int = Field(description="D, query/key features of a head without positions.")
    rotary_head_dim: int = Field(
        description="R, further query/key features, which carry the rotary positions; the key's are one for "
        "all heads."
    )
    value_head_dim: int | None = Field(default=None, description="V, features of a value head; null: D.")
    kv_lora_rank: int = Field(description="Width of the latent that keys and values are read from.")
    query_lora_rank: int | None = Field(
        description="Width of the latent that queries are read from; null: queries are not compressed."
    )

    @classmethod
    def defaults_from(cls, base: AttentionConfig, *, hidden_size: int) -> dict[str, Any]:
        """In DeepSeek-V2's proportions (its section 3.1.2): D/2 rotary features, a latent of 4·D, and 3/10
        of the hidden size for the queries' latent.
        """
        step = cls.dimension_steps["query_lora_rank"]
        return {
            **super().defaults_from(base, hidden_size=hidden_size),
            "rotary_head_dim": 2 * (-(-base.head_dim // 4)),
            "kv_lora_rank": 4 * base.head_dim,
            "query_lora_rank": max(1, round(0.3 * hidden_size / step)) * step,
        }

    @model_validator(mode="after")
    def _check_latent(self) -> LatentAttentionConfig:
        self.require_positive("rotary_head_dim", "value_head_dim", "kv_lora_rank", "query_lora_rank")
        if self.num_key_value_heads != self.num_heads:
            raise self.problem(
                "num_kv_heads",
                "latent attention reads a key and a value for each query head out of its latent",
                "leave it out; kv_lora_rank decides what is kept of a token",
            )
        if self.rotary_dim is not None:
            raise self.problem(
                "rotary_dim", "latent attention has features for the positions", "use rotary_head_dim"
            )
        if self.rotary_head_dim % 2:
            raise self.problem(
                "rotary_head_dim",
                "must be even, since features turn in pairs",
                f"use {self.rotary_head_dim + 1}",
            )
        if self.value_width > self.query_key_dim:
            raise self.problem(
                "value_head_dim",
                f"must be at most head_dim + rotary_head_dim = {self.query_key_dim}",
                f"use {self.query_key_dim} or less",
            )
        return self

    @property
    def query_key_dim(self) -> int:
        """D + R, which also sets the scale of the scores, 1/√(D + R) (the paper's equation 18)."""
        return self.head_dim + self.rotary_head_dim

    @property
    def rotary_width(self) -> int:
        """R."""
        return self.rotary_head_dim

    @property
    def value_width(self) -> int:
        """V, with the default filled in."""
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    def resolved_fields(self) -> dict[str, Any]:
        """With `value_head_dim`."""
        return {**super().resolved_fields(), "value_head_dim": self.value_width}

    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Terms by matrix (`_products`), the projection with its bias, and the norms of the latents."""
        products = self._products(hidden_size)

        def whole(term: str, elements: int) -> Weight:
            return Weight(term, elements, partial_over="tokens")

        def sharded(term: str) -> Weight:
            return Weight(term, products[term], sharded=True)

        def compressed(name: str, rank: int) -> list[Weight]:
            return [
                whole(f"{name}_down", products[f"{name}_down"]),
                whole("latent_norms", rank),
                sharded(f"{name}_up"),
            ]

        rank = self.query_lora_rank
        return [
            *([sharded("query")] if rank is None else compressed("query", rank)),
            *compressed("key_value", self.kv_lora_rank),
            *self.output_weights(hidden_size, linear_bias=linear_bias),
        ]

    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Terms: query (or query up) and key/value up, into which the hidden state or a latent goes;
        key/value down, whose R rotary columns all heads read; projection.
        """
        rank = self.query_lora_rank
        return {
            "query" if rank is None else "query_up": group.into_columns(rank or hidden_size),
            # Without sequence parallelism `DownProjection` sums their gradients, in float32.
            "key_value_down": group.handed_to_heads(self.rotary_head_dim, gradient_bytes=GRADIENT_BYTES),
            "key_value_up": group.into_columns(self.kv_lora_rank),
            "projection": group.out_of_rows(hidden_size),
        }

    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Terms by weight (`_products`), scores over D + R and values over V; two FLOPs a multiply-add."""
        heads = 2 * sequence_length * self.num_heads
        return {
            **{name: 2 * products for name, products in self._products(hidden_size).items()},
            "scores": heads * self.query_key_dim,
            "values": heads * self.value_width,
        }

    def _products(self, hidden_size: int) -> dict[str, int]:
        """Of a token with each matrix: as many as it has elements."""
        query_width = self.num_heads * self.query_key_dim
        if self.query_lora_rank is None:
            query = {"query": hidden_size * query_width}
        else:
            query = {
                "query_down": hidden_size * self.query_lora_rank,
                "query_up": self.query_lora_rank * query_width,
            }
        return {
            **query,
            "key_value_down": hidden_size * (self.kv_lora_rank + self.rotary_head_dim),
            "key_value_up": self.kv_lora_rank * self.num_heads * (self.head_dim + self.value_width),
            "projection": self.num_heads * self.value_width * hidden_size,
        }

    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Terms: what each projection reads, where it is not the hidden state that another keeps; what the
        latents' norms keep; those of the core attention. Rotary tables are twice as wide as elsewhere, since
        Megatron-core turns these features by its unfused form.
        """
        latent, rank = self.kv_lora_rank, self.query_lora_rank
        norms = layer.norm(latent, "rmsnorm", within=latent + self.rotary_head_dim)
        if rank is None:
            reads = {"key_value_down": layer.own(hidden_size)}
        else:
            reads = {"query_down": layer.own(hidden_size), "query_up": layer.own(rank)}
            norms += layer.norm(rank, "rmsnorm")
        value = self.num_heads // layer.tensor * self.value_width
        return {
            **reads,
            "latent_norms": norms,
            "key_value_up": layer.own(latent),
            **self.count_core_bytes(layer, value_bytes=layer.whole(value)),
            "rotary": layer.tables(self.rotary_head_dim),
        }

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Terms: the latent of keys and values, and the rotary key that all heads share."""
        return {"latent": self.kv_lora_rank, "rotary_key": self.rotary_head_dim}

    def transformer_config_type(self) -> type[TransformerConfig]:
        """`MLATransformerConfig`."""
        from megatron.core.transformer.transformer_config import MLATransformerConfig

        found: type[TransformerConfig] = MLATransformerConfig
        return found

    def transformer_options(self) -> dict[str, Any]:
        """Every width, since Megatron-core's defaults are one model's; plain rotary positions.

        Its default is YaRN, which turns by other angles and may change the softmax scale. The factors that
        do so are said to be neutral all the same: 0.16.1 computes the scale from them for either type.
        """
        return {
            "q_lora_rank": self.query_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_head_dim": self.head_dim,
            "qk_pos_emb_head_dim": self.rotary_head_dim,
            "v_head_dim": self.value_width,
            "rope_type": "rope",
            "rotary_scaling_factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
        }

    def build_spec(self) -> ModuleSpec:
        """`LatentSelfAttention`, Megatron-core's `MLASelfAttention` with the project's core attention."""
        from sas_megatron.attention.mla.layer import build_latent_attention_spec

        return build_latent_attention_spec(self)
