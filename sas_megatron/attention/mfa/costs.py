"""Costs of multi-matrix factorization attention. No torch."""

from __future__ import annotations

from typing_extensions import override

from sas_megatron.attention.mfa.config import FactorizedAttentionConfig
from sas_megatron.costs.activation_spec import ActivationSpec
from sas_megatron.costs.attention import AttentionCosts
from sas_megatron.costs.tensor_traffic import TensorGroup, Traffic, Weight


class FactorizedCosts(AttentionCosts):
    """Terms: `qkv` (the shared columns), `query_up`, `scores`, `values`, `projection`."""

    attention: FactorizedAttentionConfig

    @override
    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Return `qkv` with H·(R + 2D) and the norm's R, `query_up` with R·N·D, `projection` with N·D·H."""
        attention = self.attention
        query_up = attention.query_rank * attention.num_heads * attention.head_dim
        return [
            Weight("qkv", hidden_size * attention.shared_width, partial_over="tokens", summed_by="layer"),
            Weight("qkv", attention.query_rank, partial_over="tokens", summed_by="layer"),
            Weight("query_up", query_up, sharded=True),
            *self.projection_weights(hidden_size, linear_bias=linear_bias),
        ]

    @override
    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Return the 2D shared columns of key and value, the R columns of the queries, and the output."""
        return {
            "qkv": group.shared_columns(2 * self.attention.head_dim),
            "query_up": group.column_parallel_input(self.attention.query_rank),
            "projection": group.row_parallel_output(hidden_size),
        }

    @override
    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        heads_width = self.attention.num_heads * self.attention.head_dim
        attention = 2 * sequence_length * heads_width
        return {
            "qkv": 2 * hidden_size * self.attention.shared_width,
            "query_up": 2 * self.attention.query_rank * heads_width,
            "scores": attention,
            "values": attention,
            "projection": 2 * heads_width * hidden_size,
        }

    @override
    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Return the bytes of `qkv` (hidden state, saved tensors of the norm), `query_up`, core attention."""
        attention = self.attention
        # Key and value are views of 2·D columns, the key unless it is rotated.
        key_value_bytes = layer.full_bytes(2 * attention.head_dim)
        views = frozenset({"key", "value"} if attention.rotary == "none" else {"value"})
        norm = layer.norm_bytes(attention.query_rank, "rmsnorm", input_width=attention.shared_width)
        return {
            "qkv": layer.local_bytes(hidden_size) + norm,
            "query_up": layer.local_bytes(attention.query_rank),
            **self.count_core_bytes(
                layer, value_bytes=key_value_bytes, views=views, columns_bytes=key_value_bytes
            ),
        }

    @override
    def count_kv_cache_elements(self) -> dict[str, int]:
        return {"keys": self.attention.head_dim, "values": self.attention.head_dim}
