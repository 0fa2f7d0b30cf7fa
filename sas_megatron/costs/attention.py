"""Costs of an attention layer. Each variant derives a class, found by `build_attention_costs`. No torch."""

from __future__ import annotations

from typing_extensions import override

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.attention_kinds import resolve_part
from sas_megatron.costs.activation_spec import ActivationSpec, CoreAttentionSpec
from sas_megatron.costs.attention_backend import Device
from sas_megatron.costs.attention_modifiers import (
    count_input_bytes,
    count_modifier_flops,
    count_modifier_traffic,
    count_output_bytes,
    modifier_weights,
)
from sas_megatron.costs.tensor_traffic import TensorGroup, Traffic, Weight, sum_by_term


class AttentionCosts:
    """Costs of one attention layer, each as named terms that sum to the total.

    By default, the layer is Megatron-core's self-attention: a fused projection to queries, keys and values
    (`qkv`), `scores`, `values`, and an output `projection`. `AttentionConfig` defines the letters.
    """

    def __init__(self, attention: AttentionConfig) -> None:
        self.attention = attention

    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Return the layer's weights in the order in which its module registers them.

        The output projection comes last here, although Megatron-core registers it first. By default, `qkv`
        has H·D(N + 2G) elements and `projection` N·D·H, both with biases if `linear_bias` is set; the first
        also has one if `attention.qkv_bias` is set.
        """
        width = self.attention.qkv_width
        qkv = [Weight("qkv", hidden_size * width, sharded=True)]
        if linear_bias or self.attention.qkv_bias:
            qkv.append(Weight("qkv", width, sharded=True))
        return [*qkv, *self.projection_weights(hidden_size, linear_bias=linear_bias)]

    def projection_weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        """Return the weights of the output projection, row-parallel over the value heads of N query heads."""
        elements = self.attention.num_heads * self.attention.value_width * hidden_size
        weights = [Weight("projection", elements, sharded=True)]
        if linear_bias:
            weights.append(Weight("projection", hidden_size, partial_over="tokens"))
        return weights

    def count_parameters(self, hidden_size: int, *, linear_bias: bool) -> dict[str, int]:
        """Return the number of parameters by term."""
        return sum_by_term(self.weights(hidden_size, linear_bias=linear_bias))

    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        """Return the forward FLOPs of one token by term.

        A multiply-add is two FLOPs. Scores and values are counted for all S² pairs of tokens, not for the
        causal half.
        """
        attention = 2 * sequence_length * self.attention.num_heads * self.attention.head_dim
        return {**self.count_projection_flops(hidden_size), "scores": attention, "values": attention}

    def count_projection_flops(self, hidden_size: int) -> dict[str, int]:
        """Return the forward FLOPs of one token in the terms `qkv` and `projection`."""
        output_width = self.attention.head_dim * self.attention.num_heads
        return {
            "qkv": 2 * hidden_size * self.attention.qkv_width,
            "projection": 2 * output_width * hidden_size,
        }

    def count_repeated_flops(self, *, device: Device, element_bytes: int) -> dict[str, int]:
        """Return the FLOPs of one token that the layer's kernels recompute, by term.

        Recomputation by `training.recompute` and in core attention is not included.
        """
        return {}

    def count_kv_cache_elements(self) -> dict[str, int]:
        """Return the elements that decoding caches per token, by term; by default G·D for keys and values."""
        cached = self.attention.num_key_value_heads * self.attention.head_dim
        return {"keys": cached, "values": cached}

    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        """Return the activation bytes that a rank sends over the tensor group per microbatch, by term.

        With fewer key/value heads than ranks (G < P), Megatron-core additionally gathers the D(N + 2G)
        projected columns. Sums of gradients are not included: `weights` describes them.
        """
        qkv = group.column_parallel_input(hidden_size)
        if self.attention.num_key_value_heads < group.ranks:
            qkv += group.all_gather(self.attention.qkv_width)
        return {"qkv": qkv, "projection": group.row_parallel_output(hidden_size)}

    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        """Return the bytes that the layer saves per microbatch for its backward pass, by term.

        By default, `qkv` is the hidden state that the fused projection reads, `rotary` the cosines and sines,
        `attention` what core attention saves, and `projection` its result, unless core attention saves it.
        """
        # The value is a view of the projected columns, which are gathered if there are more ranks than heads.
        ranks = layer.tensor if self.attention.num_key_value_heads >= layer.tensor else 1
        columns_bytes = layer.full_bytes(self.attention.qkv_width // ranks)
        views = frozenset[str]()
        if self.attention.rotary == "none":
            queries, keys = layer.heads
            # Queries of several groups are not contiguous among the columns, and are copied.
            views = frozenset({"key", "value"} if 1 < keys < queries else {"query", "key", "value"})
        return {
            "qkv": layer.local_bytes(hidden_size),
            **self.count_core_bytes(
                layer, value_bytes=columns_bytes, views=views, columns_bytes=columns_bytes
            ),
        }

    def count_core_bytes(
        self,
        layer: ActivationSpec,
        *,
        value_bytes: int,
        views: frozenset[str] = frozenset(),
        columns_bytes: int = 0,
    ) -> dict[str, int]:
        """Return the saved bytes in the terms `rotary`, `attention`, `projection`, and those of modifiers.

        Args:
            layer: The microbatch, layout and implementation.
            value_bytes: Bytes of the tensor that the value is a view of.
            views: Those of `query`, `key` and `value` that are views of the same columns.
            columns_bytes: Bytes of these columns.
        """
        attention = self.attention
        modified = count_input_bytes(attention, layer, value_bytes=value_bytes)
        if attention.qk_norm:
            views -= {"query", "key"}
        if attention.knocking_heads:
            # The values that they save include the columns of which query and key are views.
            columns_bytes = 0 if "value" in views else columns_bytes
            views -= {"value"}
            value_bytes = layer.full_bytes(layer.heads[1] * attention.value_width)
        core = CoreAttentionSpec(
            layer,
            query_key_width=attention.query_key_dim,
            value_width=attention.value_width,
            value_bytes=value_bytes,
            has_dropout=attention.dropout > 0,
            views=views,
            columns_bytes=columns_bytes,
        ).count_bytes()
        return {
            "rotary": layer.rope_bytes(attention.rotary_width // 2),
            **modified,
            "attention": core["attention"],
            **self.count_result_bytes(layer, result_bytes=core["projection"]),
        }

    def count_result_bytes(self, layer: ActivationSpec, *, result_bytes: int) -> dict[str, int]:
        """Return the bytes saved after core attention, up to the input of the output projection.

        Args:
            layer: The microbatch, layout and implementation.
            result_bytes: Bytes of the result of core attention, 0 if core attention saves it.
        """
        return count_output_bytes(self.attention, layer, result_bytes=result_bytes)


class ModifiedCosts(AttentionCosts):
    """The costs of a variant with modifiers of attention, whose terms are added to the variant's.

    The bytes that modifiers save are included in `count_core_bytes`.
    """

    def __init__(self, variant: AttentionCosts) -> None:
        super().__init__(variant.attention)
        self.variant = variant

    @override
    def weights(self, hidden_size: int, *, linear_bias: bool) -> list[Weight]:
        own = self.variant.weights(hidden_size, linear_bias=linear_bias)
        return [*modifier_weights(self.attention, hidden_size), *own]

    @override
    def count_forward_flops(self, hidden_size: int, *, sequence_length: int) -> dict[str, int]:
        own = self.variant.count_forward_flops(hidden_size, sequence_length=sequence_length)
        return {**own, **count_modifier_flops(self.attention, hidden_size)}

    @override
    def count_repeated_flops(self, *, device: Device, element_bytes: int) -> dict[str, int]:
        return self.variant.count_repeated_flops(device=device, element_bytes=element_bytes)

    @override
    def count_kv_cache_elements(self) -> dict[str, int]:
        return self.variant.count_kv_cache_elements()

    @override
    def count_tensor_traffic(self, hidden_size: int, group: TensorGroup) -> dict[str, Traffic]:
        own = self.variant.count_tensor_traffic(hidden_size, group)
        return {**own, **count_modifier_traffic(self.attention, hidden_size, group)}

    @override
    def count_activation_bytes(self, hidden_size: int, layer: ActivationSpec) -> dict[str, int]:
        return self.variant.count_activation_bytes(hidden_size, layer)


def build_attention_costs(attention: AttentionConfig) -> AttentionCosts:
    """Build the costs of an attention: of its kind and its modifiers.

    Raises:
        FieldError: The kind is unknown, or its package registers it by the former contract.
    """
    variant: type[AttentionCosts] = resolve_part(attention.kind, "costs")
    costs = variant(attention)
    return ModifiedCosts(costs) if attention.is_modified else costs
