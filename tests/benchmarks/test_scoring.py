"""The scoring benchmark times both kinds of passages against bare passes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.rank_pool import in_layout
from tests.run_configs import small_config


def measure() -> dict[str, Any]:
    from sas_megatron.benchmarks.scoring import measure_scoring

    config = small_config()
    topology = in_layout(config.parallel)
    return measure_scoring(config, topology, num_tokens=300, batch_tokens=200, repeats=1)


def test_scoring_and_bare_passes_are_both_timed(ranks: Any) -> None:
    [result] = ranks(1).run(measure)
    assert set(result) == {"choices", "texts"}
    for rates in result.values():
        assert all(rate > 0 for rate in rates.values())
        assert rates["ratio"] == pytest.approx(rates["scoring"] / rates["bare"])
