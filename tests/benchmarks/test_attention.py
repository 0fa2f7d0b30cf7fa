"""The attention benchmark compares blocks that compute the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.parallel import ParallelConfig
from tests.benchmarks.small_ceilings import shrink_ceilings
from tests.rank_pool import in_layout


def measure() -> dict[str, Any]:
    from sas_megatron.benchmarks.attention import measure_attention
    from sas_megatron.benchmarks.attention_blocks import BlockShape

    shape = BlockShape(num_heads=3, head_dim=8, simulated_head_dim=14, sequence_length=17, batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        shrink_ceilings(patch)
        return measure_attention(shape, in_layout(ParallelConfig()), dtype=torch.float32, repeats=3)


@pytest.fixture(scope="module")
def result(ranks: Any) -> dict[str, Any]:
    """A measurement of small blocks."""
    [measured] = ranks(1).run(measure)
    return measured


def test_the_sas_block_equals_its_literal_form_and_both_are_timed(result: dict[str, Any]) -> None:
    assert result["relative_difference"] < 1e-5
    assert set(result["seconds"]) == {"sas", "literal", "multi_head"}
    # On a CPU in float32, the SAS block computes attention in chunks of matrix products.
    assert result["fused_attention"]["sas"] is None
    assert result["fused_attention"]["literal"] is not None
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["literal_over_sas"] > 0
    # On a CPU torch does not report peak memory, but the tensors saved for the backward pass are known.
    assert result["peak_bytes"] is None
    kept = result["kept_bytes"]
    assert 0 < kept["multi_head"] < kept["sas"] < kept["literal"]
    assert result["kept_share_of_literal"] == kept["sas"] / kept["literal"]


def test_the_points_of_the_roofline_are_the_measured_blocks(result: dict[str, Any]) -> None:
    from sas_megatron.benchmarks.attention import roofline_points

    points = {point.name: point for point in roofline_points(result)}
    assert {name: point.seconds for name, point in points.items()} == result["seconds"]
    assert points["sas"].flops == points["literal"].flops > points["multi_head"].flops
    # Three heads of eight features, 34 tokens, float32: input, output, their gradients, and the weights.
    activations, weights = 4 * 34 * 24, 4 * 24 * 24
    assert points["multi_head"].num_bytes == 4 * (activations + 2 * weights)
