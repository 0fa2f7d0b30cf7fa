"""Controls on SAS: neutral values, the reduction to multi-head attention, the place of rotary embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sas_megatron.attention.sas.simulated_attention import (
    ResidualMapWeights,
    aggregate_blocks,
    simulate_features,
    simulate_heads,
)
from sas_megatron.config.parallel import ParallelConfig
from tests import small_attentions as small
from tests.attention import layer_case
from tests.attention.layer_case import LayerCase, drawn
from tests.rank_pool import in_layout
from tests.selection import cases
from tests.tolerances import assert_near

# Without activation, expansion, taps, biases and features, the simulation is a matrix over the heads.
LINEAR = {
    **small.SAS,
    "head_expansion": 1,
    "kernel_size": 1,
    "head_activation": "none",
    "simulation_bias": False,
    "simulate_features": False,
}


def drawn_map(**shapes: tuple[int, ...]) -> ResidualMapWeights:
    return ResidualMapWeights(**{name: drawn(name, shape, torch.float32) for name, shape in shapes.items()})


def test_neutral_values_are_the_published_operator_bit_for_bit() -> None:
    """chuanyang-Zheng/SAS, SAS.py: convolution, residual branch of ReLU and convolution, mean over blocks."""
    heads = drawn("heads", (7, 4, 6), torch.float32, scale=1.0)
    weights = drawn_map(expand=(12, 4, 3), refine=(12, 12, 3), expand_bias=(12,), refine_bias=(12,))
    expanded = F.conv1d(heads, weights.expand, weights.expand_bias, padding=1)
    refined = F.conv1d(F.relu(expanded), weights.refine, weights.refine_bias, padding=1)
    assert torch.equal(simulate_heads(heads, weights), refined + expanded)
    weights = drawn_map(expand=(10, 6), refine=(10, 10), expand_bias=(10,), refine_bias=(10,))
    expanded = F.linear(heads, weights.expand, weights.expand_bias)
    refined = F.linear(F.relu(expanded), weights.refine, weights.refine_bias)
    assert torch.equal(simulate_features(heads, weights), refined + expanded)
    context = drawn("context", (5, 3, 12, 7), torch.float32)
    assert torch.equal(aggregate_blocks(context, 3), context.unflatten(2, (3, 4)).mean(dim=2))


def outputs_of_linear_simulation_and_multi_head(tensor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run SAS, and multi-head attention whose projections are multiplied with SAS's maps of the heads."""
    from sas_megatron.model.initialization import full_shape, tensor_parallel_shard

    in_layout(ParallelConfig(tensor=tensor))
    simulated, multi_head = (
        layer_case.build_layer(LayerCase.of(**fields), tensor) for fields in (LINEAR, small.MHA)
    )
    full = {
        name: drawn(name, tuple(full_shape(parameter)), torch.float64)
        for name, parameter in simulated.named_parameters()
    }
    # Rows in Megatron-core's order: each head's query, key and value.
    heads_NpDH = full["linear_qkv.weight"].view(4, 3, 6, -1)
    mixed = []
    for index, name in enumerate(("query", "key", "value")):
        first, second = (full[f"simulation.heads.{name}.{part}"][..., 0] for part in ("expand", "refine"))
        mixed.append(torch.einsum("mn,ndh->mdh", first + second @ first, heads_NpDH[:, index]))
    full["mixed"] = torch.stack(mixed, dim=1).flatten(0, 2)
    results = []
    for layer, projection in ((simulated, "linear_qkv.weight"), (multi_head, "mixed")):
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                weight = full[projection if name == "linear_qkv.weight" else name]
                parameter.copy_(tensor_parallel_shard(weight, parameter))
        rotary = layer_case.rotary_angles(LayerCase.of(**small.MHA).config())
        results.append(layer(layer_case.layer_input(torch.float64), None, rotary_pos_emb=rotary)[0].detach())
    return results[0], results[1]


@pytest.mark.parametrize("tensor", cases((1, 2, 4), default=(1, 2)))
def test_a_linear_simulation_only_reparametrizes_the_projections(ranks: Any, tensor: int) -> None:
    for simulated, multi_head in ranks(tensor).run(outputs_of_linear_simulation_and_multi_head, tensor):
        assert_near(simulated, multi_head, torch.float64, "output")


def output_at_positions(case: LayerCase, first: int, order: list[int]) -> torch.Tensor:
    """Return the output for tokens in another order, at positions that begin with `first`."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    in_layout(ParallelConfig())
    layer = layer_case.build_layer(case, 1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(drawn(name, parameter.shape, case.dtype))
    config, length = case.config(), layer_case.LENGTH
    rotary = None
    if config.uses_model_rotary:
        angles = RotaryEmbedding(config.rotary_width or config.head_dim, 1.0)(first + length)
        rotary = angles[first:]
    hidden = layer_case.layer_input(case.dtype)[order]
    output: torch.Tensor = layer(hidden, None, rotary_pos_emb=rotary)[0].detach()
    return output


IN_ORDER, MIXED_PREFIX = list(range(8)), [3, 0, 5, 1, 6, 2, 4, 7]


@pytest.mark.parametrize("rotary", ["after", "none"])
@pytest.mark.parametrize("kind", ["gqa", "mla", "mfa", "tpa", "sas"])
def test_without_rotary_embeddings_the_order_of_earlier_tokens_has_no_effect(
    ranks: Any, kind: str, rotary: str
) -> None:
    fields = {"gqa": small.GQA, "mla": small.MLA, "mfa": small.MFA, "tpa": small.TPA, "sas": small.SAS}[kind]
    case = LayerCase.of(**{**fields, "rotary": rotary})
    (in_order,) = ranks(1).run(output_at_positions, case, 0, IN_ORDER)
    (mixed,) = ranks(1).run(output_at_positions, case, 0, MIXED_PREFIX)
    change = (mixed[-1] - in_order[-1]).norm() / in_order[-1].norm()
    assert change < 1e-10 if rotary == "none" else change > 1e-3


@pytest.mark.parametrize(("rotary", "is_invariant"), [("after", True), ("before", False), ("none", True)])
def test_rotary_embeddings_before_the_simulation_lose_shift_invariance(
    ranks: Any, rotary: str, is_invariant: bool
) -> None:
    case = LayerCase.of(**{**small.SAS_GROUPED, "rotary": rotary})
    at_zero, at_five = (ranks(1).run(output_at_positions, case, first, IN_ORDER)[0] for first in (0, 5))
    change = (at_five - at_zero).norm() / at_zero.norm()
    # Angles are computed in float32.
    assert change < 1e-5 if is_invariant else change > 1e-3
