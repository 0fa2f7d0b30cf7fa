"""Costs of the modifiers of attention (`attention.modifiers`), which all variants share. No torch.

    term             weights                          FLOPs of a token
    qk_norm          2·E                              none, since it is element-wise
    knocking_heads   3·D²                             2·3·D² per value head
    output_norm      D                                none, since it is element-wise
    output_gate      headwise H·N, elementwise H·N·D  2 per weight

D is the width of a value head. For SAS, the value heads are the simulated ones. Tensor ranks sum the
gradients of the first three, and send the N columns of headwise gates; elementwise gates are a
column-parallel projection, whose input is sent again.
"""

from __future__ import annotations

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.costs.activation_spec import FLOAT32_BYTES, ActivationSpec
from sas_megatron.costs.tensor_traffic import TensorGroup, Traffic, Weight

MODIFIER_TERMS = ("qk_norm", "knocking_heads", "output_norm", "output_gate")


def modifier_weights(attention: AttentionConfig, hidden_size: int) -> list[Weight]:
    """Return the weights of the modifiers in the order in which they are registered, before other weights."""
    width, heads = attention.value_width, attention.num_heads
    sizes = {
        "qk_norm": [attention.query_key_dim] * 2 if attention.qk_norm else [],
        "output_norm": [width] if attention.output_norm else [],
        "knocking_heads": [width * width] * 3 if attention.knocking_heads else [],
    }
    weights = [
        Weight(term, elements, partial_over="heads", summed_by="layer")
        for term, of_term in sizes.items()
        for elements in of_term
    ]
    if attention.output_gate == "headwise":
        weights.append(Weight("output_gate", hidden_size * heads, partial_over="tokens", summed_by="layer"))
    elif attention.output_gate == "elementwise":
        weights.append(Weight("output_gate", hidden_size * heads * width, sharded=True))
    return weights


def count_modifier_flops(attention: AttentionConfig, hidden_size: int) -> dict[str, int]:
    """Return the forward FLOPs of one token by term, without element-wise operations."""
    width, terms = attention.value_width, {}
    if attention.knocking_heads:
        heads = attention.num_blocks * attention.num_key_value_heads
        terms["knocking_heads"] = 2 * 3 * width * width * heads
    gates = {"none": 0, "headwise": attention.num_heads, "elementwise": attention.num_heads * width}
    if attention.output_gate != "none":
        terms["output_gate"] = 2 * hidden_size * gates[attention.output_gate]
    return terms


def count_modifier_traffic(
    attention: AttentionConfig, hidden_size: int, group: TensorGroup
) -> dict[str, Traffic]:
    """Return the activation bytes that a rank sends over the tensor group per microbatch, by term."""
    if attention.output_gate == "headwise":
        return {"output_gate": group.shared_columns(attention.num_heads)}
    if attention.output_gate == "elementwise":
        return {"output_gate": group.column_parallel_input(hidden_size)}
    return {}


def count_input_bytes(
    attention: AttentionConfig, layer: ActivationSpec, *, value_bytes: int
) -> dict[str, int]:
    """Return the bytes that the modifiers of queries, keys and values save, by term.

    QK-norm saves the normalized heads and a float32 factor of each; knocking heads save the values, which are
    a view of a tensor of `value_bytes`, and two tensors of their size.
    """
    queries, keys = layer.heads
    terms = {}
    if attention.qk_norm:
        terms["qk_norm"] = _count_norm_bytes(layer, queries + keys, attention.query_key_dim)
    if attention.knocking_heads:
        terms["knocking_heads"] = value_bytes + 2 * layer.full_bytes(keys * attention.value_width)
    return terms


def count_output_bytes(
    attention: AttentionConfig, layer: ActivationSpec, *, result_bytes: int
) -> dict[str, int]:
    """Return the bytes that the modifiers of the result save, and the input of the output projection.

    Args:
        attention: The attention's config.
        layer: The microbatch, layout and implementation.
        result_bytes: Bytes of the result, 0 if core attention saves it.
    """
    heads = attention.num_heads // layer.tensor
    modified_bytes = layer.full_bytes(heads * attention.value_width)
    terms = {}
    if attention.output_norm:
        terms["output_norm"] = _count_norm_bytes(layer, heads, attention.value_width)
        result_bytes = modified_bytes
    if attention.output_gate != "none":
        width = attention.value_width if attention.output_gate == "elementwise" else 1
        terms["output_gate"] = result_bytes + layer.full_bytes(heads * width)
        result_bytes = modified_bytes
    return {**terms, "projection": result_bytes}


def _count_norm_bytes(layer: ActivationSpec, heads: int, width: int) -> int:
    return layer.full_bytes(heads * width) + FLOAT32_BYTES * layer.tokens * heads
