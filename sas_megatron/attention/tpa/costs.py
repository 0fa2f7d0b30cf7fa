"""Costs of tensor product attention. No torch."""

from __future__ import annotations

from typing_extensions import override

from sas_megatron.attention.tpa.config import TensorProductAttentionConfig
from sas_megatron.costs.activation_spec import ActivationSpec
from sas_megatron.costs.attention import AttentionCosts
from sas_megatron.costs.tensor_traffic import TensorGroup, Traffic, Weight


class TensorProductCosts(AttentionCosts):
    """Terms: `qkv` (the factors), `factor_products`, `scores`, `values`, `projection`."""

    attention: TensorProductAttentionConfig

    @override
    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Return `qkv` with H·(R_q + R_k + R_v)(N + D), and `projection` with N·D·H.

        A query that is not factorized has H·N·D elements instead of H·R_q(N + D).
        """
        attention = self.attention
        heads = [
            Weight("qkv", attention.num_heads * width * hidden_size, sharded=True)
            for width in attention.head_widths.values()
        ]
        features = [
            Weight("qkv", rank * attention.head_dim * hidden_size, partial_over="tokens", summed_by="layer")
            for rank in attention.ranks.values()
        ]
        return [*heads, *features, *self.projection_weights(hidden_size, linear_bias=linear_bias)]

    @override
    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Return the H columns that head factors read, the R·D shared feature factors, and the output."""
        features = group.shared_columns(sum(self.attention.ranks.values()) * self.attention.head_dim)
        return {
            "qkv": group.column_parallel_input(hidden_size) + features,
            "projection": group.row_parallel_output(hidden_size),
        }

    @override
    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Return the forward FLOPs of one token by term; each product of factors has 2·R·N·D.

        Core attention is counted on full heads, as it runs here, and not on factors as in the paper's
        decoding kernel.
        """
        heads_width = self.attention.num_heads * self.attention.head_dim
        attention = 2 * sequence_length * heads_width
        return {
            "qkv": 2 * hidden_size * self.attention.projected_width,
            "factor_products": 2 * sum(self.attention.ranks.values()) * heads_width,
            "scores": attention,
            "values": attention,
            "projection": self.count_projection_flops(hidden_size)["projection"],
        }

    @override
    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Return the bytes of `qkv`, `factor_products` and core attention.

        `qkv` saves the hidden state and two concatenated weights: the weights of all head factors, and the
        weights of all feature factors. A query that is neither factorized nor rotated is a view of all
        columns of head factors, unless chunked attention copies it.
        """
        attention = self.attention
        heads, ranks = attention.num_heads // layer.tensor, sum(attention.ranks.values())
        is_view = attention.rotary == "none" and not attention.factorize_query
        if layer.backend == "chunked" and "attention" not in layer.recomputed:
            is_view = is_view and (layer.batch == 1 or heads == 1)
        weights = heads * sum(attention.head_widths.values()) + ranks * attention.head_dim
        return {
            "qkv": layer.local_bytes(hidden_size) + layer.element_bytes * weights * hidden_size,
            "factor_products": layer.full_bytes(ranks * (heads + attention.head_dim)),
            **self.count_core_bytes(
                layer,
                value_bytes=layer.full_bytes(heads * attention.head_dim),
                views=frozenset({"query"} if is_view else ()),
                columns_bytes=layer.full_bytes(heads * sum(attention.head_widths.values())),
            ),
        }

    @override
    def count_kv_cache_elements(self) -> dict[str, int]:
        """Return R(N + D) for keys and for values: both factors of each."""
        factors = self.attention.num_heads + self.attention.head_dim
        return {"keys": self.attention.key_rank * factors, "values": self.attention.value_rank * factors}
