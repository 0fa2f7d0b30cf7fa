"""Tied attention, an example of a variant from another package: config and costs. No torch.

Each key is also the value. A config uses it by `attention: {kind: tied, num_heads: 4, num_kv_heads: 2,
head_dim: 32}`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.costs.attention import AttentionCosts
from sas_megatron.costs.tensor_traffic import Weight


class TiedAttentionConfig(AttentionConfig):
    """N query heads, and G heads that are keys with rotary embeddings, and values without."""

    kind: Literal["tied"] = Field(default="tied", description="Keys that are also values.")
    gain: float = Field(default=1.0, description="Factor of the values.")

    @property
    def projected_width(self) -> int:
        """D(N + G), the columns of the projection."""
        return self.head_dim * (self.num_heads + self.num_key_value_heads)


class TiedAttentionCosts(AttentionCosts):
    """The default costs, with a projection of D(N + G) columns and a cache of keys only."""

    attention: TiedAttentionConfig

    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Return `qkv` with H·D(N + G) elements, and `projection`."""
        width = self.attention.projected_width
        qkv = [Weight("qkv", hidden_size * width, sharded=True)]
        if linear_bias:
            qkv.append(Weight("qkv", width, sharded=True))
        return [*qkv, *self.projection_weights(hidden_size, linear_bias=linear_bias)]

    def count_projection_flops(self, hidden_size: int) -> dict[str, int]:
        """Return the forward FLOPs of one token in the terms `qkv` and `projection`."""
        flops = super().count_projection_flops(hidden_size)
        return {**flops, "qkv": 2 * hidden_size * self.attention.projected_width}

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Return G·D for keys, which are also the values."""
        return {"keys": self.attention.num_key_value_heads * self.attention.head_dim}
