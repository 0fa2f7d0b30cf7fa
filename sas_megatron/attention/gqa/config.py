"""Config of multi-head, grouped-query and multi-query attention. No torch."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import override

from sas_megatron.config.attention import AttentionConfig, InitialWeights
from sas_megatron.config.section import divisors


class ProjectedAttentionConfig(AttentionConfig):
    """The field that the three kinds share, and the start that their authors' code gives the projections."""

    supports_qkv_bias: ClassVar[bool] = True

    initialization: Literal["authors", "normal"] = Field(
        default="normal",
        description="authors: as in the code of the kind's authors (docs/initial_weights.md); normal: as for "
        "the model's other matrices.",
    )

    @override
    def initial_weights(self, name: str, full_shape: tuple[int, ...]) -> InitialWeights | None:
        """Return N(0, 1/√fan_in) for `authors` (tensorflow/mesh, mesh_tensorflow/transformer/attention.py).

        There, the query's start includes the factor 1/√D of the scores, which core attention applies here.
        Multi-query attention was published with this code; the T5 models from which grouped-query attention
        was trained have the same start.
        """
        return None if self.initialization == "normal" else InitialWeights("normal", full_shape[1] ** -0.5)


class GroupedQueryAttentionConfig(ProjectedAttentionConfig):
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


class MultiHeadAttentionConfig(ProjectedAttentionConfig):
    """Multi-head attention (Vaswani et al., arXiv 1706.03762): a key/value head for each query head."""

    kind: Literal["mha"] = Field(default="mha", description="Multi-head attention.")

    @override
    def initial_weights(self, name: str, full_shape: tuple[int, ...]) -> InitialWeights | None:
        """Return Xavier's uniform distribution of each projection for `authors`.

        This is `uniform_unit_scaling` with gain 1, of the hyperparameters `transformer_base` in
        tensorflow/tensor2tensor, for each of the four projections.
        """
        if self.initialization == "normal":
            return None
        hidden_size = full_shape[0] if name == "linear_proj.weight" else full_shape[1]
        return InitialWeights("uniform", math.sqrt(6 / (hidden_size + self.num_heads * self.head_dim)))

    @model_validator(mode="after")
    def _check_multi_head(self) -> MultiHeadAttentionConfig:
        if self.num_key_value_heads != self.num_heads:
            raise self.problem(
                "num_kv_heads",
                "must equal num_heads in multi-head attention",
                "omit it, or use kind: gqa",
                ("attention.num_kv_heads=null",),
            )
        return self


class MultiQueryAttentionConfig(ProjectedAttentionConfig):
    """Multi-query attention (Shazeer, arXiv 1911.02150): one key/value head for all query heads."""

    kind: Literal["mqa"] = Field(default="mqa", description="Multi-query attention.")
    num_kv_heads: int | None = Field(default=1, description="G, the number of key/value heads: 1.")

    @model_validator(mode="after")
    def _check_multi_query(self) -> MultiQueryAttentionConfig:
        if self.num_key_value_heads != 1:
            raise self.problem(
                "num_kv_heads",
                "must be 1 in multi-query attention",
                "omit it, or use kind: gqa",
                ("attention.num_kv_heads=1",),
            )
        return self
