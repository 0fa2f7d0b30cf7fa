"""The attention benchmark compares what computes the same."""

from __future__ import annotations

from typing import Any

import torch

from sas_megatron.config.parallel import ParallelConfig
from tests.rank_pool import in_layout


def measure() -> dict[str, Any]:
    from sas_megatron.benchmarks.attention import BlockShape, measure_attention

    shape = BlockShape(num_heads=3, head_dim=8, simulated_head_dim=14, sequence_length=17, batch_size=2)
    return measure_attention(shape, in_layout(ParallelConfig()), dtype=torch.float32, repeats=3)


def test_the_block_and_its_literal_form_agree_and_both_are_timed(ranks: Any) -> None:
    [result] = ranks(1).run(measure)
    assert result["relative_difference"] < 1e-5
    assert set(result["seconds"]) == {"sas", "literal", "multi_head"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert result["literal_over_sas"] > 0
