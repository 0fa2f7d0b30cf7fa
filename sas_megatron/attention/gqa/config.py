"""Config of multi-head, grouped-query and multi-query attention. No torch."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.section import divisors


class GroupedQueryAttentionConfig(AttentionConfig):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245): N/G query heads read a key/value head."""

    dimension_steps: ClassVar[dict[str, int]] = {**AttentionConfig.dimension_steps, "num_kv_heads": 1}
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_kv_heads", "head_dim")

    kind: Literal["gqa"] = Field(default="gqa", description="Grouped-query attention.")

    @classmethod
    @override
    def defaults_from(cls, base: AttentionConfig, *, hidden_size: int) -> dict[str, Any]:
        """Return the base's groups, or if it has none, about N/4, preferably a power of two."""
        heads, groups = base.num_heads, base.num_key_value_heads
        if not 1 < groups < heads:
            proper = divisors(heads)[1:-1]
            powers = [count for count in proper if count & (count - 1) == 0]
            candidates = powers or proper or [1]
            groups = min(candidates, key=lambda count: abs(math.log(4 * count / heads)))
        return {**super().defaults_from(base, hidden_size=hidden_size), "num_kv_heads": groups}


class MultiHeadAttentionConfig(AttentionConfig):
    """Multi-head attention (Vaswani et al., arXiv 1706.03762): a key/value head for each query head."""

    kind: Literal["mha"] = Field(default="mha", description="Multi-head attention.")

    @model_validator(mode="after")
    def _check_multi_head(self) -> MultiHeadAttentionConfig:
        if self.num_key_value_heads != self.num_heads:
            raise self.problem(
                "num_kv_heads",
                "must equal num_heads in multi-head attention",
                "omit it, or use kind: gqa",
            )
        return self


class MultiQueryAttentionConfig(AttentionConfig):
    """Multi-query attention (Shazeer, arXiv 1911.02150): one key/value head for all query heads."""

    kind: Literal["mqa"] = Field(default="mqa", description="Multi-query attention.")
    num_kv_heads: int | None = Field(default=1, description="G, the number of key/value heads: 1.")

    @model_validator(mode="after")
    def _check_multi_query(self) -> MultiQueryAttentionConfig:
        if self.num_key_value_heads != 1:
            raise self.problem(
                "num_kv_heads", "must be 1 in multi-query attention", "omit it, or use kind: gqa"
            )
        return self
