"""Multi-matrix factorization attention (arXiv 2412.19255): the config, its rules, its costs; no torch.

Many wide query heads from one low-rank projection, and a single key and value head for all of them: the
queries' capacity grows with N·D at a cost of C·N·D parameters, while decoding keeps 2·D numbers of a
token, however many heads there are. The layer is in `factorized_layer`.

The paper's key-reuse form (MFA-KR), whose values are made from the keys, is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.layer_pass import ActivationSpec
from sas_megatron.config.tensor_group import TensorGroup, Traffic, Weight

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class FactorizedAttentionConfig(AttentionConfig):
    """Queries of N heads by way of C normalized columns; one key and one value head of D features.

    These projections have no biases; `model.linear_bias` gives the output projection one.
    """

    has_fused_qkv: ClassVar[bool] = False
    dimension_steps: ClassVar[dict[str, int]] = {**AttentionConfig.dimension_steps, "query_rank": 8}
    # More heads cost no more to decode, and that is what the method is for.
    size_dimensions: ClassVar[tuple[str, ...]] = ("num_heads",)
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_heads", "head_dim")

    kind: Literal["mfa"] = Field(default="mfa", description="Multi-matrix factorization attention.")
    num_kv_heads: int | None = Field(default=1, description="G, key/value heads; one here.")
    query_rank: int = Field(description="C, columns that the queries of all heads are made from.")

    @classmethod
    def defaults_from(cls, base: AttentionConfig, *, hidden_size: int) -> dict[str, Any]:
        """Heads twice as wide as the base's, from a quarter of the hidden size: a choice of this project."""
        step, head_dim = cls.dimension_steps["query_rank"], 2 * base.head_dim
        rank = min(max(1, round(hidden_size / 4 / step)) * step, base.num_heads * head_dim)
        return {"num_heads": base.num_heads, "head_dim": head_dim, "query_rank": rank}

    @model_validator(mode="after")
    def _check_factorized(self) -> FactorizedAttentionConfig:
        self.require_positive("query_rank")
        if self.num_key_value_heads != 1:
            raise self.problem(
                "num_kv_heads",
                "multi-matrix factorization attention has one key and one value head",
                "leave it out, or use kind: gqa",
            )
        if self.query_rank > self.num_heads * self.head_dim:
            raise self.problem(
                "query_rank",
                f"must not exceed the {self.num_heads * self.head_dim} features of all query heads",
                "use less, or kind: mqa, whose queries are of full rank",
            )
        return self

    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Terms: qkv, H·(C + 2D) and the norm's C; query up, C·N·D; projection, N·D·H."""
        return [
            Weight("qkv", hidden_size * self._shared_width, partial_over="tokens", summed_by="layer"),
            Weight("qkv", self.query_rank, partial_over="tokens", summed_by="layer"),
            Weight("query_up", self.query_rank * self.num_heads * self.head_dim, sharded=True),
            *self.output_weights(hidden_size, linear_bias=linear_bias),
        ]

    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Terms: qkv, the key's and value's 2D shared columns; query up, into which C go; projection."""
        return {
            "qkv": group.handed_to_heads(2 * self.head_dim),
            "query_up": group.into_columns(self.query_rank),
            "projection": group.out_of_rows(hidden_size),
        }

    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Terms: qkv, query up, scores, values, projection; two FLOPs a multiply-add, S² scores."""
        heads_width = self.num_heads * self.head_dim
        attention = 2 * sequence_length * heads_width
        return {
            "qkv": 2 * hidden_size * self._shared_width,
            "query_up": 2 * self.query_rank * heads_width,
            "scores": attention,
            "values": attention,
            "projection": 2 * heads_width * hidden_size,
        }

    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Terms: qkv, the hidden state and what the queries' norm keeps; query up, the C normalized columns;
        those of the core attention, where key and value are views of 2·D columns.
        """
        norm = layer.norm(self.query_rank, "rmsnorm", within=self._shared_width)
        return {
            "qkv": layer.own(hidden_size) + norm,
            "query_up": layer.own(self.query_rank),
            **self.count_core_bytes(layer, value_bytes=layer.whole(2 * self.head_dim)),
        }

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Terms: keys D, values D, whatever the number of heads."""
        return {"keys": self.head_dim, "values": self.head_dim}

    def build_spec(self) -> ModuleSpec:
        """`FactorizedSelfAttention`, its shared columns in place of Megatron-core's fused projection."""
        from sas_megatron.attention.mfa.layer import build_factorized_spec

        return build_factorized_spec(self)

    @property
    def _shared_width(self) -> int:
        """Columns that all heads read: C of the queries, D of the key, D of the value."""
        return self.query_rank + 2 * self.head_dim
