"""Context parallelism changes no variant's function: outputs and every gradient against one process."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.errors import FieldError
from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.attention.test_attention_properties import VARIANTS
from tests.tolerances import assert_near

SAS_OVER_HEADS: dict[str, Any] = {
    "kind": "sas",
    "num_heads": 2,
    "head_dim": 6,
    "head_expansion": 2,
    "simulated_head_dim": 10,
}

CASES = {
    **{f"{name} C=2": (fields, 1, 2, False) for name, fields in VARIANTS.items()},
    **{f"{name} C=4": (fields, 1, 4, False) for name, fields in VARIANTS.items()},
    **{f"{name} P=2 C=2": (fields, 2, 2, False) for name, fields in VARIANTS.items()},
    **{f"{name} P=2 C=2 sequence": (fields, 2, 2, True) for name, fields in VARIANTS.items()},
    # Two base heads shared by four ranks: simulated heads go further than base heads.
    "sas C=4 > N": (SAS_OVER_HEADS, 1, 4, False),
}


# By layout, so that each one's groups are made once.
@pytest.mark.parametrize("name", CASES)
def test_context_ranks_compute_the_definition(ranks: Any, name: str) -> None:
    fields, tensor, context, sequence = CASES[name]
    case = LayerCase.of(sequence_parallel=sequence, **fields)
    expected = layer_case.by_reference(case.attention, case.dtype)
    by_rank = ranks(tensor * context).run(layer_case.on_rank, case, tensor, context)
    actual = layer_case.joined_over_context(case, by_rank, tensor=tensor, context=context)
    assert_near(actual.output, expected.output, case.dtype, "output")
    assert_near(actual.input_gradient, expected.input_gradient, case.dtype, "input gradient")
    for parameter, gradient in expected.gradients.items():
        assert_near(actual.gradients[parameter], gradient, case.dtype, f"gradient of {parameter}")


def test_heads_that_context_ranks_cannot_share_are_refused() -> None:
    case = LayerCase.of(**VARIANTS["mha"])
    with pytest.raises(
        FieldError, match=r"parallel\.context=4: must divide the 2 heads .*; use one of \[1, 2\]"
    ):
        case.config().check_context_parallel(2, 4)
    LayerCase.of(**VARIANTS["sas"]).config().check_context_parallel(2, 3)
