"""Multi-head, grouped-query and multi-query attention: Megatron-core's own module, our core attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.section import divisors

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


class _PlainAttentionConfig(AttentionConfig):
    """G key/value heads, each read by N/G query heads; how many G may be is what tells the kinds apart."""

    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Terms: qkv, scores q·kᵀ, values p·v, projection; two FLOPs a multiply-add, S² scores."""
        attention = 2 * sequence_length * self.num_heads * self.head_dim
        return {**self.count_projection_flops(hidden_size), "scores": attention, "values": attention}

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Terms: keys G·D, values G·D."""
        kept = self.num_key_value_heads * self.head_dim
        return {"keys": kept, "values": kept}

    def build_spec(self) -> ModuleSpec:
        """Megatron-core's `SelfAttention` with the project's core attention."""
        from sas_megatron.attention.core import build_self_attention_spec
        from sas_megatron.attention.kv_cache import CachingSelfAttention

        return build_self_attention_spec(self, module=CachingSelfAttention)


class GroupedQueryAttentionConfig(_PlainAttentionConfig):
    """Grouped-query attention (arXiv 2305.13245)."""

    dimension_steps: ClassVar[dict[str, int]] = {**AttentionConfig.dimension_steps, "num_kv_heads": 1}
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_kv_heads", "head_dim")

    kind: Literal["gqa"] = Field(default="gqa", description="Grouped-query attention.")

    @classmethod
    def defaults_from(cls, base: AttentionConfig, *, hidden_size: int) -> dict[str, Any]:
        """The base's groups where it has some; otherwise about N/4, a power of two where one divides N."""
        heads, groups = base.num_heads, base.num_key_value_heads
        if not 1 < groups < heads:
            between = divisors(heads)[1:-1]
            powers = [count for count in between if count & (count - 1) == 0]
            near = powers or between or [1]
            groups = min(near, key=lambda count: abs(math.log(4 * count / heads)))
        return {**super().defaults_from(base, hidden_size=hidden_size), "num_kv_heads": groups}


class MultiHeadAttentionConfig(_PlainAttentionConfig):
    """Multi-head attention (Vaswani et al., arXiv 1706.03762): as many key/value heads as query heads."""

    kind: Literal["mha"] = Field(default="mha", description="Multi-head attention.")

    @model_validator(mode="after")
    def _check_multi_head(self) -> MultiHeadAttentionConfig:
        if self.num_key_value_heads != self.num_heads:
            raise self.problem(
                "num_kv_heads",
                "multi-head attention has one for each query head",
                "leave it out, or use kind: gqa",
            )
        return self


class MultiQueryAttentionConfig(_PlainAttentionConfig):
    """Multi-query attention (Shazeer, arXiv 1911.02150): one key/value head for all queries."""

    kind: Literal["mqa"] = Field(default="mqa", description="Multi-query attention.")
    num_kv_heads: int | None = Field(default=1, description="G, key/value heads; one here.")

    @model_validator(mode="after")
    def _check_multi_query(self) -> MultiQueryAttentionConfig:
        if self.num_key_value_heads != 1:
            raise self.problem(
                "num_kv_heads", "multi-query attention has one", "leave it out, or use kind: gqa"
            )
        return self
