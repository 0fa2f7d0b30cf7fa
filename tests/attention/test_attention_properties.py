"""Properties of every variant: causality, its definition, and dropout that differs between tensor ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sas_megatron.attention.sas.simulated_attention import aggregate_blocks
from sas_megatron.config.parallel import ParallelConfig
from tests import small_attentions as small
from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.rank_pool import in_layout
from tests.tolerances import assert_near

VARIANTS: dict[str, small.Attention] = {
    "mha": small.MHA,
    "gqa": small.GQA,
    "mqa": small.MQA,
    "mla": {**small.MLA, "head_dim": 5, "rotary_head_dim": 6, "value_head_dim": 7},
    "mla uncompressed queries": {**small.MLA_UNCOMPRESSED_QUERIES, "kv_lora_rank": 7},
    "sas": {**small.SAS, "kernel_size": 5},
    "sas grouped": {**small.SAS_GROUPED, "head_expansion": 2},
    "diff": small.DIFF,
    "diff grouped": small.DIFF_GROUPED,
    "mfa": small.MFA,
    "tpa": small.TPA,
    "tpa kv": {**small.TPA_UNFACTORED_QUERIES, "value_rank": 3},
    "gqa without rotary": {**small.GQA, "rotary": "none"},
    "mla without rotary": {**small.MLA, "rotary": "none"},
    "mfa without rotary": {**small.MFA, "rotary": "none"},
    "tpa without rotary": {**small.TPA, "rotary": "none"},
    # Without biases, of which those of keys have no effect (and gradients of 0) without a later rotation.
    "sas rotary before": {
        **small.SAS_GROUPED,
        "rotary": "before",
        "aggregation": "rsqrt",
        "simulation_bias": False,
    },
}


def output_change(case: LayerCase, changed_token: int) -> torch.Tensor:
    """Return the largest change of the output at each position when one token's input changes."""
    in_layout(ParallelConfig())
    layer = layer_case.build_layer(case, 1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(layer_case.drawn(name, parameter.shape, case.dtype))
    rotary = layer_case.rotary_angles(case.config())
    hidden = layer_case.layer_input(case.dtype)
    before, _ = layer(hidden, None, rotary_pos_emb=rotary)
    hidden[changed_token] += 1.0
    after, _ = layer(hidden, None, rotary_pos_emb=rotary)
    return (after - before).abs().amax(dim=(1, 2)).detach()


@pytest.mark.parametrize("backend", ["auto", "fused", "unfused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_changed_token_affects_only_itself_and_later_tokens(ranks: Any, variant: str, backend: str) -> None:
    case = LayerCase.of(backend=backend, **VARIANTS[variant])
    [change] = ranks(1).run(output_change, case, 5)
    assert change[:5].max() == 0.0
    assert (change[5:] > 0.0).all(), "the changed token must affect itself and all later tokens"


@pytest.mark.parametrize("variant", [name for name, fields in VARIANTS.items() if fields["kind"] != "sas"])
@pytest.mark.parametrize(
    ("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, False), (4, True)]
)
def test_baselines_compute_their_definition_at_any_number_of_ranks(
    ranks: Any, variant: str, tensor: int, sequence_parallel: bool
) -> None:
    case = LayerCase.of(sequence_parallel=sequence_parallel, **VARIANTS[variant])
    expected = layer_case.by_definition(case.attention, case.dtype)
    actual = layer_case.joined(case, ranks(tensor).run(layer_case.on_rank, case, tensor))
    actual.assert_near(expected, case.dtype)


def attention_weights_dropped(tensor: int, seed: int) -> torch.Tensor:
    """Return the output of equal attention weights with dropout, which shows the dropped weights."""
    from sas_megatron.attention.core import CoreAttention
    from sas_megatron.config.attention import parse_attention

    in_layout(ParallelConfig(tensor=tensor), seed=seed)
    attention = parse_attention({"kind": "mha", "num_heads": 2, "head_dim": 16, "dropout": 0.5})
    core = CoreAttention(
        layer_case.transformer_config(LayerCase.of(**VARIANTS["mha"]), tensor), attention=attention
    )
    query = torch.zeros(16, 1, 2, 16)
    value = torch.eye(16)[:, None, None, :].expand(16, 1, 2, 16)
    return core.train()(query, query, value, None)


def test_tensor_ranks_drop_different_attention_weights_reproducibly(ranks: Any) -> None:
    first, second = ranks(2).run(attention_weights_dropped, 2, 3)
    again, _ = ranks(2).run(attention_weights_dropped, 2, 3)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


@pytest.mark.parametrize(("aggregation", "divisor"), [("mean", 3), ("rsqrt", math.sqrt(3))])
def test_aggregating_before_projecting_equals_projecting_each_block(aggregation: str, divisor: float) -> None:
    context = layer_case.drawn("context", (5, 3, 12, 7), torch.float64)
    weight = layer_case.drawn("projection", (20, 4 * 7), torch.float64)
    each = [block.flatten(2) @ weight.T for block in context.chunk(3, dim=2)]
    once = aggregate_blocks(context, 3, aggregation=aggregation).flatten(2) @ weight.T
    assert_near(once, torch.stack(each).sum(dim=0) / divisor, torch.float64, "aggregation")
