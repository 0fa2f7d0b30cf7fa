"""`attention.exchange=auto` selects the cheaper exchange, and logs the estimates."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest

from sas_megatron.attention.sas import tensor_parallel
from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.tensor_parallel import choose_exchange, exchange_costs


def sas(**fields: Any) -> SimulatedAttentionConfig:
    return SimulatedAttentionConfig(**{"num_heads": 16, "head_dim": 64, **fields})


@pytest.mark.parametrize("tensor", [2, 4, 8, 16])
def test_auto_selects_the_cheaper_exchange_and_logs_both_estimates(
    caplog: pytest.LogCaptureFixture, tensor: int
) -> None:
    for groups, expansion, kernel in itertools.product((16, 4, 1), (1, 2, 3), (1, 3)):
        attention = sas(num_kv_heads=groups, head_expansion=expansion, kernel_size=kernel)
        costs = exchange_costs(attention, tensor_parallel=tensor)
        cheaper = "gather" if costs["gather"].seconds < costs["all_to_all"].seconds else "all_to_all"
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert choose_exchange(attention, tensor_parallel=tensor) == cheaper
        (record,) = caplog.records
        assert record.getMessage() == (
            f"attention.exchange=auto: {cheaper} (estimated ns per token and layer: "
            f"gather {costs['gather'].seconds * 1e9:.2f}, all_to_all {costs['all_to_all'].seconds * 1e9:.2f})"
        )


@pytest.mark.parametrize("exchange", ["gather", "all_to_all"])
def test_a_configured_exchange_is_used_without_a_log_line(
    caplog: pytest.LogCaptureFixture, exchange: str
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_exchange(sas(exchange=exchange), tensor_parallel=4) == exchange
        choose_exchange(sas(), tensor_parallel=1)
    assert not caplog.records


def test_each_of_the_three_terms_can_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = sas(head_expansion=3)  # gather sends less if P < 4
    for name in ("LINK_BYTES_PER_SECOND", "MATRIX_FLOPS_PER_SECOND", "MEMORY_BYTES_PER_SECOND"):
        # Only this term has a cost.
        with monkeypatch.context() as patch:
            for other in ("LINK_BYTES_PER_SECOND", "MATRIX_FLOPS_PER_SECOND", "MEMORY_BYTES_PER_SECOND"):
                patch.setattr(tensor_parallel, other, 1.0 if other == name else 1e300)
            choices = [choose_exchange(attention, tensor_parallel=tensor) for tensor in (2, 8)]
        by_link = ["gather", "all_to_all"]
        assert choices == (by_link if name.startswith("LINK") else ["all_to_all", "all_to_all"]), name


def test_gather_repeats_the_first_convolution_of_other_ranks_heads() -> None:
    gather = exchange_costs(sas(num_kv_heads=4, head_expansion=2, kernel_size=3), tensor_parallel=4)["gather"]
    n, g, d, r, k = 16, 4, 64, 2, 3
    assert gather.repeated_flops == pytest.approx(3 / 4 * 2 * k * r * (n * n + 2 * g * g) * d)
    assert gather.repeated_elements == pytest.approx(3 / 4 * (1 + r) * (n + 2 * g) * d)
