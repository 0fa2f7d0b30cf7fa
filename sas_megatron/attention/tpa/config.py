"""Tensor product attention (T6, arXiv 2501.06425): the config, its rules and its costs; no torch.

A token's queries of all heads are a sum of R outer products, of a vector over the heads (A) with one
over the features (B), both linear in the hidden state; likewise keys and values. What decoding keeps
of a token is the factors, not the heads. The layer is in `tensor_product_layer`; the paper's h, d_h
and d are N, D and H here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.attention import AttentionConfig, InitialWeights
from sas_megatron.config.layer_pass import ActivationSpec
from sas_megatron.config.tensor_group import TensorGroup, Traffic, Weight

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec

# The ranks of the paper's models.
DEFAULT_QUERY_RANK, DEFAULT_KEY_VALUE_RANK = 6, 2


class TensorProductAttentionConfig(AttentionConfig):
    """Queries, keys and values of N heads as sums of R products of a head and a feature factor.

    Every head has its own keys and values, so there are no groups. The factors have no biases, as in
    the paper; `model.linear_bias` gives the output projection one.
    """

    dimension_steps: ClassVar[dict[str, int]] = {
        **AttentionConfig.dimension_steps,
        "query_rank": 1,
        "key_rank": 1,
        "value_rank": 1,
    }
    # Factors cost so little that the authors raise the number of heads to equal another attention.
    size_dimensions: ClassVar[tuple[str, ...]] = ("num_heads",)
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_heads", "key_rank", "value_rank")

    kind: Literal["tpa"] = Field(default="tpa", description="Tensor product attention.")
    factorize_query: bool = Field(
        default=True, description="Off: the paper's KV-only form, queries by an ordinary projection."
    )
    query_rank: int | None = Field(
        default=None, description="R_q, products in a query; null: 6, or none where it is not factorized."
    )
    key_rank: int = Field(default=DEFAULT_KEY_VALUE_RANK, description="R_k, products in a key.")
    value_rank: int = Field(default=DEFAULT_KEY_VALUE_RANK, description="R_v, products in a value.")
    initialization: Literal["authors", "normal"] = Field(
        default="authors",
        description="authors: factors by Xavier's uniform rule, output projection 0; normal: as the model's "
        "other matrices.",
    )

    @model_validator(mode="after")
    def _check_tensor_product(self) -> TensorProductAttentionConfig:
        self.require_positive("query_rank", "key_rank", "value_rank")
        if self.num_key_value_heads != self.num_heads:
            raise self.problem(
                "num_kv_heads",
                "tensor product attention has one for each query head",
                "leave it out, and set attention.key_rank and attention.value_rank",
            )
        if self.query_rank is not None and not self.factorize_query:
            raise self.problem(
                "query_rank",
                "queries have no rank where attention.factorize_query=false",
                "leave it out, or set attention.factorize_query=true",
            )
        return self

    @property
    def ranks(self) -> dict[str, int]:
        """R of what is factorized, by `query`, `key` and `value`."""
        ranks = {"key": self.key_rank, "value": self.value_rank}
        return {"query": self.query_rank or DEFAULT_QUERY_RANK, **ranks} if self.factorize_query else ranks

    @property
    def head_widths(self) -> dict[str, int]:
        """Columns that each head has of its own: R head factors, or a query's D features."""
        return {"query": self.head_dim, **self.ranks}

    def initial_weights(self, name: str, whole_shape: tuple[int, ...]) -> InitialWeights | None:
        """By the authors: Xavier's uniform rule, each matrix by its own shape; output projection 0."""
        if self.initialization == "normal":
            return None
        if name == "linear_proj.weight":
            return InitialWeights("normal", 0.0)
        return InitialWeights("uniform", math.sqrt(6 / sum(whole_shape)))

    def resolved_fields(self) -> dict[str, Any]:
        """With `query_rank`."""
        return {**super().resolved_fields(), "query_rank": self.ranks.get("query")}

    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Terms: qkv, H·(R_q + R_k + R_v)(N + D), with H·N·D in place of the query's; projection, N·D·H."""
        heads = [
            Weight("qkv", self.num_heads * width * hidden_size, sharded=True)
            for width in self.head_widths.values()
        ]
        features = [
            Weight("qkv", rank * self.head_dim * hidden_size, partial_over="tokens", summed_by="layer")
            for rank in self.ranks.values()
        ]
        return [*heads, *features, *self.output_weights(hidden_size, linear_bias=linear_bias)]

    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Terms: qkv, into which the head factors take H columns, and R·D feature factors for all heads;
        projection.
        """
        features = group.handed_to_heads(sum(self.ranks.values()) * self.head_dim)
        return {
            "qkv": group.into_columns(hidden_size) + features,
            "projection": group.out_of_rows(hidden_size),
        }

    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Terms: qkv (the factors), factor products 2·R·N·D of each, scores, values, projection.

        As Megatron-core's rotary positions and our core attention compute it: on whole heads, not on
        factors, as the paper's decoding kernel does.
        """
        attention = 2 * sequence_length * self.num_heads * self.head_dim
        return {
            "qkv": 2 * hidden_size * self._count_projected_columns(),
            "factor_products": 2 * sum(self.ranks.values()) * self.num_heads * self.head_dim,
            "scores": attention,
            "values": attention,
            "projection": self.count_projection_flops(hidden_size)["projection"],
        }

    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Terms: qkv, the hidden state and the copies that join the weights of a kind of factor; factor
        products, the factors that they multiply; those of the core attention.
        """
        heads, ranks = self.num_heads // layer.tensor, sum(self.ranks.values())
        weights = heads * sum(self.head_widths.values()) + ranks * self.head_dim
        return {
            "qkv": layer.own(hidden_size) + layer.element_bytes * weights * hidden_size,
            "factor_products": layer.whole(ranks * (heads + self.head_dim)),
            **self.count_core_bytes(layer, value_bytes=layer.whole(heads * self.head_dim)),
        }

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Terms: keys R_k(N + D), values R_v(N + D): both factors of each."""
        factors = self.num_heads + self.head_dim
        return {"keys": self.key_rank * factors, "values": self.value_rank * factors}

    def build_spec(self) -> ModuleSpec:
        """`TensorProductSelfAttention`, its factors in place of Megatron-core's fused projection."""
        from sas_megatron.attention.tpa.layer import build_tensor_product_spec

        return build_tensor_product_spec(self)

    def _count_projected_columns(self) -> int:
        own = self.num_heads * sum(self.head_widths.values())
        return own + self.head_dim * sum(self.ranks.values())
