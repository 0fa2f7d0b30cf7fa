"""Multi-head, grouped-query and multi-query attention: Megatron-core's own module, our core attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from sas_megatron.config.attention import AttentionConfig

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class GroupedQueryAttentionConfig(AttentionConfig):
    """Grouped-query attention (arXiv 2305.13245): G key/value heads, each read by N/G query heads."""

    kind: Literal["gqa"] = Field(default="gqa", description="Grouped-query attention.")

    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Terms: qkv, scores q·kᵀ, values p·v, projection; two FLOPs a multiply-add, S² scores."""
        attention = 2 * sequence_length * self.num_heads * self.head_dim
        return {**self._count_projection_flops(hidden_size), "scores": attention, "values": attention}

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Terms: keys G·D, values G·D."""
        kept = self.num_key_value_heads * self.head_dim
        return {"keys": kept, "values": kept}

    def build_spec(self) -> ModuleSpec:
        """Megatron-core's `SelfAttention` with the project's core attention."""
        from megatron.core.transformer.attention import SelfAttention

        from sas_megatron.attention.core import build_self_attention_spec

        return build_self_attention_spec(self, module=SelfAttention)


class MultiHeadAttentionConfig(GroupedQueryAttentionConfig):
    """Multi-head attention (Vaswani et al., arXiv 1706.03762): as many key/value heads as query heads."""

    kind: Literal["mha"] = Field(  # type: ignore[assignment]
        default="mha", description="Multi-head attention."
    )

    @model_validator(mode="after")
    def _check_multi_head(self) -> MultiHeadAttentionConfig:
        if self.num_key_value_heads != self.num_heads:
            raise self.problem(
                "num_kv_heads",
                "multi-head attention has one for each query head",
                "leave it out, or use kind: gqa",
            )
        return self


class MultiQueryAttentionConfig(GroupedQueryAttentionConfig):
    """Multi-query attention (Shazeer, arXiv 1911.02150): one key/value head for all queries."""

    kind: Literal["mqa"] = Field(  # type: ignore[assignment]
        default="mqa", description="Multi-query attention."
    )
    num_kv_heads: int | None = Field(default=1, description="G, key/value heads; one here.")

    @model_validator(mode="after")
    def _check_multi_query(self) -> MultiQueryAttentionConfig:
        if self.num_key_value_heads != 1:
            raise self.problem(
                "num_kv_heads", "multi-query attention has one", "leave it out, or use kind: gqa"
            )
        return self
