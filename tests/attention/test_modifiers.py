"""Each modifier of attention computes its definition with every kind, on ranks of every layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.attention.test_attention_properties import VARIANTS
from tests.attention.test_simulated_layer import check

MODIFIERS: dict[str, dict[str, Any]] = {
    "elementwise gate": {"output_gate": "elementwise"},
    "headwise gate": {"output_gate": "headwise"},
    "output norm": {"output_norm": True},
    "qk norm": {"qk_norm": True},
    "knocking heads": {"knocking_heads": True},
    "all": {"output_gate": "elementwise", "output_norm": True, "qk_norm": True, "knocking_heads": True},
}


@pytest.mark.parametrize("tensor,sequence", [(1, False), (2, False), (2, True), (4, True)])
@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_x(ranks: Any, variant: str, modifier: str, tensor: int, sequence: bool) -> None:
    check(ranks, LayerCase.of(sequence_parallel=sequence, **VARIANTS[variant], **MODIFIERS[modifier]), tensor)
