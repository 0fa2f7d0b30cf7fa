"""Each modifier of attention computes its definition with every kind, on the ranks of every layout."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests import small_attentions as small
from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.attention.test_attention_properties import output_change
from tests.selection import cases

MODIFIERS: dict[str, dict[str, Any]] = {
    "elementwise gate": {"output_gate": "elementwise"},
    "headwise gate": {"output_gate": "headwise"},
    "output norm": {"output_norm": True},
    "QK-norm": {"qk_norm": True},
    "knocking heads": {"knocking_heads": True},
    "all, elementwise gate": small.MODIFIERS,
    "all, headwise gate": {**small.MODIFIERS, "output_gate": "headwise"},
}
# If keys are not rotated, a bias of all keys does not change the softmax: its gradient is 0 but for rounding.
UNBIASED = {**small.SAS_GROUPED, "head_expansion": 2, "simulation_bias": False}
KINDS: dict[str, small.Attention] = {
    "mha": small.MHA,
    "gqa": {**small.GQA, "backend": "unfused"},
    "mqa": {**small.MQA, "rotary_dim": 4},
    "diff": small.DIFF,
    "diff grouped": {**small.DIFF_GROUPED, "backend": "fused"},
    "mla": {**small.MLA, "head_dim": 5, "rotary_head_dim": 6, "value_head_dim": 7},
    "mfa": small.MFA,
    "tpa": small.TPA,
    "tpa kv, no rotary": {**small.TPA_UNFACTORED_QUERIES, "rotary": "none"},
    "sas gather": {**small.SAS, "exchange": "gather", "aggregation": "rsqrt"},
    "sas all to all": {**small.SAS_GROUPED, "exchange": "all_to_all"},
    "sas rotary before": {**UNBIASED, "rotary": "before"},
}
# Tensor ranks, context ranks, sequence parallelism.
LAYOUTS = {
    "alone": (1, 1, False),
    "P=2": (2, 1, False),
    "P=2 sequence": (2, 1, True),
    "P=4": (4, 1, False),
    "P=4 sequence": (4, 1, True),
    "C=2": (1, 2, False),
    "P=2 C=2 sequence": (2, 2, True),
}
# Ordered by layout, so that process groups are created once per layout.
CASES = list(itertools.product(LAYOUTS, KINDS, MODIFIERS))
# All pairs of a kind and a modifier, a kind and a layout, a modifier and a layout.
PAIRWISE = [
    (list(LAYOUTS)[(number + other) % len(LAYOUTS)], kind, modifier)
    for (number, kind), (other, modifier) in itertools.product(enumerate(KINDS), enumerate(MODIFIERS))
]


def test_the_default_run_has_all_pairs() -> None:
    for first, second in itertools.combinations(range(3), 2):
        tables = (LAYOUTS, KINDS, MODIFIERS)
        pairs = {(case[first], case[second]) for case in PAIRWISE}
        assert pairs == set(itertools.product(tables[first], tables[second]))


@pytest.mark.parametrize(("layout", "kind", "modifier"), cases(CASES, default=PAIRWISE))
def test_modified_attention_computes_its_definition(
    ranks: Any, layout: str, kind: str, modifier: str
) -> None:
    tensor, context, sequence = LAYOUTS[layout]
    case = LayerCase.of(sequence_parallel=sequence, **KINDS[kind], **MODIFIERS[modifier])
    expected = layer_case.by_definition(case.attention, case.dtype)
    by_rank = ranks(tensor * context).run(layer_case.on_rank, case, tensor, context)
    if context > 1:
        actual = layer_case.joined_over_context(case, by_rank, tensor=tensor, context=context)
    else:
        actual = layer_case.joined(case, by_rank)
    actual.assert_near(expected, case.dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_token_affects_only_itself_and_later_tokens(ranks: Any, kind: str) -> None:
    [change] = ranks(1).run(output_change, LayerCase.of(**KINDS[kind], **small.MODIFIERS), 5)
    assert change[:5].max() == 0.0
    assert (change[5:] > 0.0).all(), "the changed token must affect itself and all later tokens"
