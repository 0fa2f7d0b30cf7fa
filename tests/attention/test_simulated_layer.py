"""The SAS layer computes its definition: outputs, input gradients and every parameter's gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.selection import cases, exhaustive

BOTH = ("gather", "all_to_all")


def sas(**fields: Any) -> dict[str, Any]:
    return {"kind": "sas", "head_dim": 6, "head_expansion": 2, "simulated_head_dim": 10, **fields}


def unbiased(**fields: Any) -> dict[str, Any]:
    """Return SAS without biases: a bias that all keys share does not change unrotated attention weights."""
    return sas(simulation_bias=False, **fields)


# The cases contain each option of the operator at least once, with N = 4, 6 and 12, and grouped
# and multi-query heads.
OPERATORS: dict[str, dict[str, Any]] = {
    "plain": sas(num_heads=4),
    "wide kernel": sas(num_heads=4, kernel_size=5),
    "mlp form": sas(num_heads=4, kernel_size=1),
    "six heads": sas(num_heads=6, head_expansion=3),
    "twelve heads": sas(num_heads=12, head_expansion=3, head_dim=2, simulated_head_dim=4),
    "no expansion": sas(num_heads=4, head_expansion=1),
    "grouped": sas(num_heads=4, num_kv_heads=2),
    "grouped three": sas(num_heads=6, num_kv_heads=3, kernel_size=1),
    "grouped three, partial rotary, no biases": sas(
        num_heads=6, num_kv_heads=3, rotary_dim=4, simulation_bias=False
    ),
    "grouped twelve": sas(num_heads=12, num_kv_heads=4, head_dim=2, simulated_head_dim=2),
    "multi-query": sas(num_heads=4, num_kv_heads=1, head_expansion=3),
    "multi-query twelve": sas(num_heads=12, num_kv_heads=1, kernel_size=5),
    "default features": {"kind": "sas", "num_heads": 4, "head_dim": 6},
    "partial rotary": sas(num_heads=4, rotary_dim=4),
    "no biases": sas(num_heads=4, simulation_bias=False),
    "no query heads": sas(num_heads=4, simulate_query_heads=False),
    "no key heads": sas(num_heads=4, num_kv_heads=2, simulate_key_heads=False),
    "no value heads": sas(num_heads=4, num_kv_heads=2, simulate_value_heads=False),
    "no features": sas(num_heads=4, simulate_features=False, simulated_head_dim=6),
    "features only": sas(
        num_heads=4, simulate_query_heads=False, simulate_key_heads=False, simulate_value_heads=False
    ),
    "gelu": sas(num_heads=4, head_activation="gelu", feature_activation="gelu"),
    "linear heads": sas(num_heads=4, num_kv_heads=2, head_activation="none", feature_activation="gelu"),
    "linear features, rsqrt": sas(num_heads=4, feature_activation="none", aggregation="rsqrt"),
    "rotary before": unbiased(num_heads=4, rotary="before"),
    "rotary before, grouped three, partial": unbiased(
        num_heads=6, num_kv_heads=3, rotary="before", rotary_dim=4, head_expansion=3, aggregation="rsqrt"
    ),
    "rotary before, multi-query": unbiased(num_heads=4, num_kv_heads=1, rotary="before"),
    "rotary before, features only": unbiased(
        num_heads=4,
        num_kv_heads=2,
        rotary="before",
        simulate_query_heads=False,
        simulate_key_heads=False,
        simulate_value_heads=False,
    ),
    "no rotary": unbiased(num_heads=4, num_kv_heads=2, rotary="none"),
    "value alone": sas(
        num_heads=4,
        simulate_query_heads=False,
        simulate_key_heads=False,
        simulate_features=False,
        simulated_head_dim=6,
    ),
    "unfused": sas(num_heads=4, num_kv_heads=2, backend="unfused"),
    "fused": sas(num_heads=4, backend="fused"),
}

# Layouts of the default run: tensor ranks, exchange, sequence parallelism. The three ways to shard key and
# value heads run in every layout. The other options run in the layouts that they interact with.
EVERY_LAYOUT = tuple(itertools.product((2, 4), BOTH, (False, True)))
DEFAULT_LAYOUTS: dict[str, tuple[tuple[int, str, bool], ...]] = {
    "plain": EVERY_LAYOUT,
    "grouped": EVERY_LAYOUT,
    "multi-query": EVERY_LAYOUT,
    "wide kernel": ((2, "all_to_all", True),),
    "mlp form": ((4, "gather", False),),
    "six heads": ((2, "all_to_all", False),),
    "twelve heads": ((4, "gather", True),),
    "no expansion": ((4, "all_to_all", True),),
    "grouped twelve": ((4, "all_to_all", False), (2, "gather", True)),
    "multi-query twelve": ((4, "all_to_all", True),),
    "default features": ((2, "gather", False),),
    "partial rotary": ((4, "all_to_all", False),),
    "no biases": ((2, "all_to_all", True), (4, "gather", False)),
    "no query heads": ((2, "gather", True), (4, "all_to_all", False)),
    "no key heads": ((4, "gather", False), (2, "all_to_all", True)),
    "no value heads": ((2, "gather", True), (4, "all_to_all", False)),
    "no features": ((2, "all_to_all", False),),
    "features only": ((4, "gather", True), (2, "all_to_all", False)),
    "gelu": ((2, "gather", False),),
    "linear heads": ((4, "all_to_all", True),),
    "linear features, rsqrt": ((2, "all_to_all", True),),
    "rotary before": ((2, "gather", True), (4, "all_to_all", False)),
    "rotary before, grouped three, partial": ((2, "all_to_all", True),),
    "rotary before, multi-query": ((2, "all_to_all", False), (4, "gather", True)),
    "rotary before, features only": ((2, "gather", False),),
    "no rotary": ((2, "all_to_all", True),),
    "value alone": ((2, "gather", True),),
    "unfused": ((2, "gather", True),),
    "fused": ((4, "all_to_all", False),),
}


def legal(fields: dict[str, Any], tensor: int) -> bool:
    groups = fields.get("num_kv_heads", fields["num_heads"])
    return fields["num_heads"] % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)


def check(ranks: Any, case: LayerCase, tensor: int) -> None:
    expected = layer_case.by_definition(case.attention, case.dtype)
    actual = layer_case.joined(case, ranks(tensor).run(layer_case.on_rank, case, tensor))
    actual.assert_near(expected, case.dtype)


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_rank_computes_the_definition(ranks: Any, operator: str) -> None:
    # The exchange does not change the function, so the definition is cached for the tests below.
    check(ranks, LayerCase.of(exchange="gather", **OPERATORS[operator]), 1)


@pytest.mark.parametrize(
    ("operator", "tensor", "exchange", "sequence_parallel"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}-{case[1]}-{case[2]}{'-sequence' if case[3] else ''}",
            marks=() if case[1:] in DEFAULT_LAYOUTS.get(case[0], ()) else exhaustive,
        )
        for case in itertools.product(OPERATORS, (2, 4), BOTH, (False, True))
        if legal(OPERATORS[case[0]], case[1])
    ],
)
def test_any_number_of_ranks_computes_the_definition(
    ranks: Any, operator: str, tensor: int, exchange: str, sequence_parallel: bool
) -> None:
    check(
        ranks,
        LayerCase.of(sequence_parallel=sequence_parallel, exchange=exchange, **OPERATORS[operator]),
        tensor,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("exchange", BOTH)
@pytest.mark.parametrize("tensor", [1, 2])
def test_lower_precision_stays_within_the_table(
    ranks: Any, tensor: int, exchange: str, dtype: torch.dtype
) -> None:
    check(ranks, LayerCase.of(dtype=dtype, exchange=exchange, **OPERATORS["grouped"]), tensor)


# Each default case calls different kernels; tests/attention/fused varies their shapes.
@pytest.mark.parametrize(
    "operator",
    cases(
        [
            name
            for name, fields in OPERATORS.items()
            if name not in ("unfused", "fused") and LayerCase.of(**fields).config().unfusable_field is None
        ],
        default=(
            "grouped three, partial rotary, no biases",
            "multi-query",
            "no key heads",
            "no features",
            "features only",
        ),
    ),
)
def test_fused_kernels_compute_the_definition(ranks: Any, operator: str) -> None:
    fields = {**OPERATORS[operator], "kernel": "fused", "exchange": "gather"}
    check(ranks, LayerCase.of(dtype=torch.float32, **fields), 1)


FUSED_ON_TWO_RANKS = {
    "plain": True,
    "grouped": False,
    "multi-query": True,
    "no key heads": False,
    "partial rotary": False,
}


@pytest.mark.parametrize(
    ("operator", "sequence_parallel", "exchange"),
    [
        pytest.param(
            operator,
            sequence_parallel,
            exchange,
            marks=()
            if (operator, exchange) in (("multi-query", "gather"), ("no key heads", "all_to_all"))
            else exhaustive,
        )
        for (operator, sequence_parallel), exchange in itertools.product(FUSED_ON_TWO_RANKS.items(), BOTH)
    ],
)
def test_fused_kernels_compute_the_definition_on_two_ranks(
    ranks: Any, operator: str, exchange: str, sequence_parallel: bool
) -> None:
    fields = {**OPERATORS[operator], "kernel": "fused", "exchange": exchange}
    check(ranks, LayerCase.of(dtype=torch.float32, sequence_parallel=sequence_parallel, **fields), 2)


def test_fused_kernels_stay_within_the_table_in_bfloat16(ranks: Any) -> None:
    check(ranks, LayerCase.of(dtype=torch.bfloat16, kernel="fused", **OPERATORS["grouped"]), 1)


def _without_gradient_sum(case: LayerCase, tensor: int) -> Any:
    from sas_megatron.attention.sas import layer as simulated_layer

    kept = simulated_layer.sum_gradients_over
    simulated_layer.sum_gradients_over = lambda _group, weights: tuple(weights)
    try:
        return layer_case.on_rank(case, tensor)
    finally:
        simulated_layer.sum_gradients_over = kept


@pytest.mark.parametrize("exchange", BOTH)
def test_a_missing_gradient_sum_is_detected(ranks: Any, exchange: str) -> None:
    case = LayerCase.of(exchange=exchange, **OPERATORS["plain"])
    by_rank = ranks(2).run(_without_gradient_sum, case, 2)
    with pytest.raises(AssertionError, match=r"simulation.*differs between rank 0 and rank"):
        layer_case.joined(case, by_rank)


def _of_length(length: int, case: LayerCase, tensor: int) -> Any:
    kept, layer_case.LENGTH = layer_case.LENGTH, length
    try:
        return layer_case.on_rank(case, tensor)
    finally:
        layer_case.LENGTH = kept


# With three sequences, length 7 gives uneven numbers of tokens, and length 1 three tokens for four ranks.
@pytest.mark.parametrize("length", [7, 1])
def test_tokens_need_not_divide_by_the_ranks(
    ranks: Any, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    case = LayerCase.of(exchange="all_to_all", **OPERATORS["grouped"])
    by_rank = ranks(4).run(_of_length, length, case, 4)
    monkeypatch.setattr(layer_case, "LENGTH", length)
    expected = layer_case.by_definition.__wrapped__(case.attention, case.dtype)
    actual = layer_case.joined(case, by_rank)
    actual.assert_near(expected, case.dtype)
