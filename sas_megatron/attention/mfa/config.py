"""Config of multi-matrix factorization attention, MFA (arXiv 2412.19255). No torch.

MFA has many wide query heads from one low-rank projection, and one key and one value head for all of them.
The capacity of the queries grows with N·D for R·N·D parameters, while decoding caches 2·D elements per token,
independently of the number of heads. R, the rank of the queries, is C in the paper.

The paper's variant MFA-KR, which computes values from keys, is not implemented.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from sas_megatron.config.attention import AttentionConfig


class FactorizedAttentionConfig(AttentionConfig):
    """N query heads from R normalized columns, and one key and one value head of D features.

    These projections have no biases; `model.linear_bias` adds one to the output projection only.
    """

    has_fused_qkv: ClassVar[bool] = False
    dimension_steps: ClassVar[dict[str, int]] = {**AttentionConfig.dimension_steps, "query_rank": 8}
    # The method is made for many heads, since these do not increase the cost of decoding.
    size_dimensions: ClassVar[tuple[str, ...]] = ("num_heads",)
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_heads", "head_dim")

    kind: Literal["mfa"] = Field(default="mfa", description="Multi-matrix factorization attention.")
    num_kv_heads: int | None = Field(default=1, description="G, the number of key/value heads: 1.")
    query_rank: int = Field(description="R, the columns from which the queries of all heads are projected.")

    @classmethod
    @override
    def defaults_from(cls, base: AttentionConfig, *, hidden_size: int) -> dict[str, Any]:
        """Return heads twice as wide as the base's and R = H/4, which is a choice of this project."""
        step, head_dim = cls.dimension_steps["query_rank"], 2 * base.head_dim
        rank = min(max(1, round(hidden_size / 4 / step)) * step, base.num_heads * head_dim)
        return {"num_heads": base.num_heads, "head_dim": head_dim, "query_rank": rank}

    @model_validator(mode="after")
    def _check_factorized(self) -> FactorizedAttentionConfig:
        self.require_positive("query_rank")
        if self.num_key_value_heads != 1:
            raise self.problem(
                "num_kv_heads",
                "must be 1 in multi-matrix factorization attention",
                "omit it, or use kind: gqa",
                ("attention.num_kv_heads=1",),
            )
        if self.query_rank > self.num_heads * self.head_dim:
            raise self.problem(
                "query_rank",
                f"must not exceed the {self.num_heads * self.head_dim} features of all query heads",
                "use a smaller rank, or kind: mqa, whose queries have full rank",
                (f"attention.query_rank={self.num_heads * self.head_dim}",),
            )
        return self

    @property
    def shared_width(self) -> int:
        """R + 2D, the columns of the queries, the key and the value that all heads read."""
        return self.query_rank + 2 * self.head_dim
