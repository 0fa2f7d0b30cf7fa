"""The weights counted from the config equal the built model's."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.parameters import chunk_weights
from tests.model.small_runs import small_runs
from tests.rank_pool import in_layout


def _registered_sizes(config: RunConfig) -> list[int]:
    from sas_megatron.model.assembly import build_gpt_chunks

    in_layout(config.parallel)
    (model,) = build_gpt_chunks(config)
    return [parameter.numel() for parameter in model.parameters()]


# The same examples in each run, so that failures are reproducible.
@settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(config=small_runs())
def test_weights_are_listed_in_the_order_in_which_they_are_registered(ranks: Any, config: RunConfig) -> None:
    (registered,) = ranks(1).run(_registered_sizes, config)
    assert [weight.elements for weight in chunk_weights(config, stage=0, chunk=0)] == registered
