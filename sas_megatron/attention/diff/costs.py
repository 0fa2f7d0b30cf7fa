"""Costs of differential attention, second version. No torch."""

from __future__ import annotations

from typing_extensions import override

from sas_megatron.attention.diff.config import DifferentialAttentionConfig
from sas_megatron.costs.activation_spec import ActivationSpec
from sas_megatron.costs.attention import AttentionCosts
from sas_megatron.costs.tensor_traffic import TensorGroup, Traffic, Weight


class DifferentialCosts(AttentionCosts):
    """Terms: `qkv` (with 2N query heads), `difference` (the factors λ), `scores`, `values`, `projection`."""

    attention: DifferentialAttentionConfig

    @override
    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Return `qkv` with H·D(2N + 2G), `projection` with N·D·H and `difference` with H·N."""
        elements = hidden_size * self.attention.num_heads
        factors = Weight("difference", elements, partial_over="tokens", summed_by="layer")
        return [*super().weights(hidden_size, linear_bias=linear_bias), factors]

    @override
    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Return self-attention's traffic, and that of the N columns of λ, which every rank computes."""
        own = super().count_tensor_traffic(hidden_size, group)
        return {**own, "difference": group.shared_columns(self.attention.num_heads)}

    @override
    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Return the forward FLOPs of one token by term; the difference itself is element-wise."""
        attention = 2 * sequence_length * self.attention.num_query_heads * self.attention.head_dim
        return {
            **self.count_projection_flops(hidden_size),
            "difference": 2 * hidden_size * self.attention.num_heads,
            "scores": attention,
            "values": attention,
        }

    @override
    def count_result_bytes(self, layer: ActivationSpec, *, result_bytes: int) -> dict[str, int]:
        """Return the bytes of the results of 2N heads and of λ, and those after the difference."""
        heads = self.attention.num_heads // layer.tensor
        difference_bytes = layer.full_bytes(heads * self.attention.value_width)
        return {
            "difference": result_bytes + layer.full_bytes(heads),
            **super().count_result_bytes(layer, result_bytes=difference_bytes),
        }
