"""Context ranks compute each variant's definition: outputs and every gradient."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from sas_megatron.config.errors import FieldError
from sas_megatron.config.head_layout import check_context_parallel
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.costs.head_sharding import count_context_elements
from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.attention.test_attention_properties import VARIANTS
from tests.conftest import ROOT
from tests.rank_pool import in_layout
from tests.selection import cases

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
    # There are too few keys to shard the blocks, or to shard at all: keys are sharded in order, or copied.
    "sas multi-query C=2": ({**VARIANTS["sas"], "num_kv_heads": 1, "head_expansion": 2}, 1, 2, False),
    # Three keys and two ranks: neither number divides the other, so six copies are sent.
    "gqa G=3 C=2": ({"kind": "gqa", "num_heads": 6, "num_kv_heads": 3, "head_dim": 6}, 1, 2, False),
    "sas multi-query C=4": ({**VARIANTS["sas"], "num_kv_heads": 1, "head_expansion": 2}, 1, 4, False),
    # Two base heads on four ranks: there are enough simulated heads.
    "sas C=4 > N": (SAS_OVER_HEADS, 1, 4, False),
}

# Cases that run only with `--all`. The default run has each variant on two tensor ranks, with or without
# sequence parallelism, and each way to shard heads on four context ranks with one variant.
CASES_OF_ALL = (
    "mha P=2 C=2",
    "gqa P=2 C=2 sequence",
    "mqa P=2 C=2",
    "mla uncompressed queries P=2 C=2 sequence",
    "sas P=2 C=2",
    "tpa P=2 C=2 sequence",
    "tpa kv P=2 C=2",
    "mla uncompressed queries C=4",
    *(f"{kind} without rotary {layout}" for kind in ("mfa", "tpa") for layout in ("C=2", "C=4", "P=2 C=2")),
    *(f"gqa without rotary {layout}" for layout in ("C=4", "P=2 C=2", "P=2 C=2 sequence")),
    *(f"mla without rotary {layout}" for layout in ("C=2", "C=4", "P=2 C=2")),
    *(f"sas rotary before {layout}" for layout in ("C=2", "P=2 C=2")),
    "gqa C=4",
    "tpa kv C=4",
)


# Ordered by layout, so that process groups are created once per layout.
@pytest.mark.parametrize("name", cases(CASES, default=CASES.keys() - set(CASES_OF_ALL)))
def test_context_ranks_compute_the_definition(ranks: Any, name: str) -> None:
    fields, tensor, context, sequence = CASES[name]
    case = LayerCase.of(sequence_parallel=sequence, **fields)
    expected = layer_case.by_definition(case.attention, case.dtype)
    by_rank = ranks(tensor * context).run(layer_case.on_rank, case, tensor, context)
    actual = layer_case.joined_over_context(case, by_rank, tensor=tensor, context=context)
    actual.assert_near(expected, case.dtype)


def test_a_number_of_context_ranks_that_does_not_divide_the_heads_is_rejected() -> None:
    case = LayerCase.of(**VARIANTS["mha"])
    with pytest.raises(
        FieldError, match=r"parallel\.context=4: must divide the 2 heads .*; use one of \[1, 2\]"
    ):
        check_context_parallel(case.config(), 2, 4)
    check_context_parallel(LayerCase.of(**VARIANTS["sas"]).config(), 2, 3)


def bytes_over_context(case: LayerCase, context: int) -> tuple[float, float]:
    """Return the bytes that this rank sends over the context group, forward and backward."""
    from sas_megatron.distributed.communication_counter import CommunicationCounter

    topology = in_layout(ParallelConfig(context=context))
    layer = layer_case.build_layer(case, 1, context)
    hidden = torch.randn(layer_case.LENGTH // context, layer_case.BATCH, layer_case.HIDDEN_SIZE)
    hidden.requires_grad_()
    angles = layer_case.rotary_angles(case.config())[: layer_case.LENGTH // context]
    forward, backward = (CommunicationCounter(topology.groups()) for _ in range(2))
    with forward:
        output, _ = layer(hidden, None, rotary_pos_emb=angles)
    with backward:
        output.sum().backward()
    return forward.total("context"), backward.total("context")


@pytest.mark.parametrize(
    ("fields", "context", "width"),
    [
        # r(N+G)E + rGD for queries, keys and values; N·D of the result if a rank has all blocks of its heads.
        ({"num_heads": 4}, 2, 2 * (4 + 4) * 10 + 2 * 4 * 6 + 4 * 6),
        ({"num_heads": 4, "num_kv_heads": 2}, 2, 2 * (4 + 2) * 10 + 2 * 2 * 6 + 4 * 6),
        # More ranks than base heads: r·N·D of the result.
        ({"num_heads": 2}, 4, 2 * (2 + 2) * 10 + 2 * 2 * 6 + 2 * 2 * 6),
        # Multi-query: the r key heads are sent in order, one copy per rank, and the result before the mean.
        ({"num_heads": 4, "num_kv_heads": 1}, 4, 2 * 4 * 10 + 4 * (10 + 6) + 2 * 4 * 6),
        # With more heads, the mean saves more than copies of the key heads of each block cost.
        ({"num_heads": 16, "num_kv_heads": 1}, 2, 2 * 16 * 10 + 2 * 2 * (10 + 6) + 16 * 6),
    ],
)
def test_context_ranks_send_the_bytes_of_the_formula(
    ranks: Any, fields: dict[str, int], context: int, width: int
) -> None:
    case = LayerCase.of(dtype=torch.float32, **{**SAS_OVER_HEADS, **fields})
    local_tokens = layer_case.LENGTH // context * layer_case.BATCH
    expected = (context - 1) / context * local_tokens * width * 4
    assert (
        ranks(context).run(bytes_over_context, case, context)
        == [pytest.approx((expected, expected))] * context
    )


@pytest.mark.parametrize(
    ("size", "kind", "context", "ratio"),
    [("1.3b", "mqa", 2, 1.78), ("1.3b", "mfa", 4, 1.71), ("1.3b", "gqa", 8, 1.33)],
)
def test_fewer_elements_are_sent_than_with_a_copy_of_the_key_for_each_query_head(
    size: str, kind: str, context: int, ratio: float
) -> None:
    attention = load_run_config(ROOT / "configs" / size / f"{kind}.yaml").attention
    queries, width = attention.num_heads, attention.head_dim
    copied = Fraction(context - 1, context) * 4 * queries * width
    assert float(copied / count_context_elements(attention, tensor=1, context=context)) == pytest.approx(
        ratio, abs=0.005
    )
