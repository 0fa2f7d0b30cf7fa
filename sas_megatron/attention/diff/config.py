"""Config of differential attention, second version (microsoft/unilm, Diff-Transformer/Diff-Transformer-V2).

Twice as many query heads as in multi-head attention read unchanged keys and values, and each pair of them
becomes one head: the first minus λ times the second, with λ = σ(x·W_λ) for each token and head. There is no
norm after the difference, unlike in the first version (arXiv 2410.05258).

The authors have not published the initialization of W_λ. Here it starts as the model's other matrices, from
N(0, σ), so that λ is about 1/2 at the start.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from typing_extensions import override

from sas_megatron.config.attention import AttentionConfig


class DifferentialAttentionConfig(AttentionConfig):
    """2N query heads, G key/value heads, N heads after the difference; a pair reads one key/value head."""

    supports_qkv_bias: ClassVar[bool] = True
    dimension_steps: ClassVar[dict[str, int]] = {**AttentionConfig.dimension_steps, "num_kv_heads": 1}
    cache_dimensions: ClassVar[tuple[str, ...]] = ("num_kv_heads", "head_dim")

    kind: Literal["diff"] = Field(default="diff", description="Differential attention, second version.")
    num_heads: int = Field(description="N, heads after the difference of 2N query heads.")

    @property
    @override
    def num_query_heads(self) -> int:
        """2N."""
        return 2 * self.num_heads
