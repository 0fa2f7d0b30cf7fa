"""Tied attention, an example of a variant from outside: each key is its own value. The config; no torch.

`attention: {kind: tied, num_heads: 4, num_kv_heads: 2, head_dim: 32}` in a config is all that a run needs.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.tensor_group import Weight


class TiedAttentionConfig(AttentionConfig):
    """N query heads, and G heads that are keys and, before rotary positions turn them, values."""

    kind: Literal["tied"] = Field(default="tied", description="Keys that are their own values.")
    gain: float = Field(default=1.0, description="What the values are multiplied by.")

    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Terms: qkv, H·D(N + G), and projection."""
        qkv = [Weight("qkv", hidden_size * self._projected_width, sharded=True)]
        if linear_bias:
            qkv.append(Weight("qkv", self._projected_width, sharded=True))
        return [*qkv, *self.output_weights(hidden_size, linear_bias=linear_bias)]

    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Terms: qkv, scores, values, projection."""
        attention = 2 * sequence_length * self.num_heads * self.head_dim
        return {
            "qkv": 2 * hidden_size * self._projected_width,
            "scores": attention,
            "values": attention,
            "projection": self.count_projection_flops(hidden_size)["projection"],
        }

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Terms: keys, G·D, which the values are read from."""
        return {"keys": self.num_key_value_heads * self.head_dim}

    def build_spec(self) -> Any:
        """Megatron-core's self-attention on half of the key and value columns."""
        from tied_attention_layer import build_tied_spec

        return build_tied_spec(self)

    @property
    def _projected_width(self) -> int:
        return self.head_dim * (self.num_heads + self.num_key_value_heads)
