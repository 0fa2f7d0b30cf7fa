"""The attention benchmark compares what computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.parallel import ParallelConfig
from tests.benchmarks.small_ceilings import shrink_ceilings
from tests.rank_pool import in_layout


def measure() -> dict[str, Any]:
    from sas_megatron.benchmarks.attention import measure_attention
    from sas_megatron.benchmarks.block_shape import BlockShape

    shape = BlockShape(num_heads=3, head_dim=8, simulated_head_dim=14, sequence_length=17, batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        shrink_ceilings(patch)
        return measure_attention(shape, in_layout(ParallelConfig()), dtype=torch.float32, repeats=3)


@pytest.fixture(scope="module")
def result(ranks: Any) -> dict[str, Any]:
    """A measurement of small blocks."""
    [measured] = ranks(1).run(measure)
    return measured


def test_the_block_and_its_literal_form_agree_and_both_are_timed(result: dict[str, Any]) -> None:
    assert result["relative_difference"] < 1e-5
    assert set(result["seconds"]) == {"sas", "literal", "multi_head"}
    # On a CPU, in float32, ours attend by chunks of plain products.
    assert result["fused_attention"]["sas"] is None
    assert result["fused_attention"]["literal"] is not None
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["literal_over_sas"] > 0
    # On a CPU torch does not say what is held at the most, but what is kept for the backward pass.
    assert result["peak_bytes"] is None
    kept = result["kept_bytes"]
    assert 0 < kept["multi_head"] < kept["sas"] < kept["literal"]
    assert result["kept_share_of_literal"] == kept["sas"] / kept["literal"]


def test_points_under_the_roofline_are_what_was_timed(result: dict[str, Any]) -> None:
    from sas_megatron.benchmarks.attention import points_of

    points = {point.name: point for point in points_of(result)}
    assert {name: point.seconds for name, point in points.items()} == result["seconds"]
    assert points["sas"].flops == points["literal"].flops > points["multi_head"].flops
    # Three heads of eight features, 34 tokens, in float32: input and output and their gradients, and weights.
    passed, weights = 4 * 34 * 24, 4 * 24 * 24
    assert points["multi_head"].num_bytes == 4 * (passed + 2 * weights)
