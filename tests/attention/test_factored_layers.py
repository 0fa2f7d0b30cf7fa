"""Layers with factored projections compute their definition on tensor ranks, and have the published costs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from sas_megatron.config.attention import parse_attention
from sas_megatron.costs.attention import build_attention_costs
from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.attention.test_simulated_layer import check
from tests.selection import exhaustive


def tpa(**fields: Any) -> dict[str, Any]:
    return {"kind": "tpa", "num_heads": 4, "head_dim": 6, **fields}


def mfa(**fields: Any) -> dict[str, Any]:
    return {"kind": "mfa", "num_heads": 4, "head_dim": 6, "query_rank": 7, **fields}


OPERATORS: dict[str, dict[str, Any]] = {
    "tpa": tpa(),
    "tpa, ranks 3 1 4": tpa(query_rank=3, key_rank=1, value_rank=4),
    "tpa, KV only": tpa(factorize_query=False, key_rank=3),
    "tpa, partial rotary": tpa(num_heads=12, rotary_dim=4),
    "tpa, unfused": tpa(backend="unfused"),
    "mfa": mfa(),
    "mfa, rank 1, partial rotary": mfa(query_rank=1, rotary_dim=4),
    "mfa, wide heads": mfa(num_heads=8, head_dim=10, query_rank=24),
    "mfa, unfused": mfa(backend="unfused"),
}


# By default, each operator runs on one rank, and on two or four ranks with and without sequence parallelism.
# The first operator of each kind runs in every layout.
IN_EVERY_LAYOUT = ("tpa", "mfa")
TENSOR_OF_SEQUENCE = {
    operator: {True: 2, False: 4} if index % 2 else {True: 4, False: 2}
    for index, operator in enumerate(OPERATORS)
}


def in_default_run(tensor: int, sequence: bool, operator: str) -> bool:
    return tensor == 1 or operator in IN_EVERY_LAYOUT or TENSOR_OF_SEQUENCE[operator][sequence] == tensor


@pytest.mark.parametrize(
    ("tensor", "sequence", "operator"),
    [
        pytest.param(*case, marks=() if in_default_run(*case) else exhaustive)
        for case in itertools.product((1, 2, 4), (False, True), OPERATORS)
        if case[0] > 1 or not case[1]
    ],
)
def test_any_number_of_ranks_computes_the_definition(
    ranks: Any, operator: str, tensor: int, sequence: bool
) -> None:
    check(ranks, LayerCase.of(sequence_parallel=sequence, **OPERATORS[operator]), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("operator", ["tpa", "mfa"])
def test_lower_precision_stays_within_the_table(
    ranks: Any, operator: str, sequence: bool, dtype: torch.dtype
) -> None:
    check(ranks, LayerCase.of(dtype=dtype, sequence_parallel=sequence, **OPERATORS[operator]), 2)


def _without(missing: str, case: LayerCase, tensor: int) -> Any:
    from sas_megatron.distributed import gradient_sums

    kept = getattr(gradient_sums, missing)
    without = {
        "sum_gradients_over": lambda _group, weights: tuple(weights),
        "copy_to_tensor_model_parallel_region": lambda columns, **_options: columns,
    }
    setattr(gradient_sums, missing, without[missing])
    try:
        return layer_case.on_rank(case, tensor)
    finally:
        setattr(gradient_sums, missing, kept)


@pytest.mark.parametrize("operator", ["tpa", "mfa"])
def test_a_missing_sum_over_ranks_is_detected(ranks: Any, operator: str) -> None:
    for sequence, missing in ((True, "sum_gradients_over"), (False, "copy_to_tensor_model_parallel_region")):
        case = LayerCase.of(sequence_parallel=sequence, **OPERATORS[operator])
        with pytest.raises(AssertionError, match=r"differs between rank|has a different input gradient"):
            layer_case.joined(case, ranks(2).run(_without, missing, case, 2))


def test_tensor_products_have_the_published_parameters_and_cache() -> None:
    """arXiv 2501.06425, table 1: d(R_q + R_k + R_v)(h + d_h) + d·h·d_h, and (R_k + R_v)(h + d_h) cached."""
    hidden, heads, width = 48, 4, 10
    attention = parse_attention(tpa(head_dim=width, query_rank=5, key_rank=2, value_rank=3))
    parameters = build_attention_costs(attention).count_parameters(hidden, linear_bias=False)
    assert sum(parameters.values()) == hidden * (5 + 2 + 3) * (heads + width) + hidden * heads * width
    assert build_attention_costs(attention).count_kv_cache_elements() == {
        "keys": 2 * (heads + width),
        "values": 3 * (heads + width),
    }


def test_factorization_has_the_published_parameters_and_cache() -> None:
    """arXiv 2412.19255: query down and up, one key and value head, output; 2·d cached."""
    hidden, heads, width, rank = 48, 6, 10, 13
    attention = parse_attention(mfa(num_heads=heads, head_dim=width, query_rank=rank))
    parameters = build_attention_costs(attention).count_parameters(hidden, linear_bias=False)
    query = hidden * rank + rank + rank * heads * width
    assert sum(parameters.values()) == query + 2 * hidden * width + heads * width * hidden
    assert build_attention_costs(attention).count_kv_cache_elements() == {"keys": width, "values": width}


def test_queries_without_factors_have_an_ordinary_projection() -> None:
    factorized = build_attention_costs(parse_attention(tpa())).count_parameters(48, linear_bias=False)
    plain = build_attention_costs(parse_attention(tpa(factorize_query=False))).count_parameters(
        48, linear_bias=False
    )
    assert plain["qkv"] - factorized["qkv"] == 48 * (4 * 6 - 6 * (4 + 6))
