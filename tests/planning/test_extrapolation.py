"""Steps of few microbatches and models of few layers determine longer steps and deeper models exactly."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.run_configs import small_config
from tests.selection import cases
from tests.training.layouts import ATTENTIONS

# The buffers of the distributed optimizer are padded to a multiple of 128 elements per rank, which is not
# linear in depth.
PADDING = 1e-2
# The shard of a rank starts and ends within parameters, with padding between them. This is not linear in
# depth either, and the difference is large for parameters as small as here.
SHARDED_STATE = 0.1

DISTRIBUTED: dict[str, Any] = {"optimizer": {"learning_rate": 0.01, "distributed": True}}
MHA, GATHER, ALL_TO_ALL = (ATTENTIONS[name] for name in ("mha", "sas-gather", "sas-all_to_all"))
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "one rank": (1, MHA, {}, {}),
    "tensor-data": (4, ALL_TO_ALL, {"tensor": 2, "sequence": True}, DISTRIBUTED),
    "context-data": (4, GATHER, {"context": 2}, {}),
}


def _config(layout: str, *, num_layers: int, num_microbatches: int) -> tuple[int, RunConfig]:
    world_size, attention, parallel, sections = LAYOUTS[layout]
    data_parallel = world_size // (parallel.get("tensor", 1) * parallel.get("context", 1))
    model = {
        "num_layers": num_layers,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "vocab_size": 512,
        "vocab_multiple": 8,
    }
    return world_size, small_config(
        model=model,
        attention={**attention, "head_dim": 8},
        parallel=parallel,
        training={"micro_batch_size": 2, "global_batch_size": 2 * data_parallel * num_microbatches},
        **sections,
    )


def _extrapolated_and_full_step(case: tuple[int, RunConfig], microbatches: int) -> tuple[Any, Any]:
    """Return the report extrapolated from few microbatches, and the report of a step of all microbatches."""
    from sas_megatron.planning import rank_estimate

    world_size, config = case
    original = rank_estimate._profiled_microbatches
    extrapolated = rank_estimate.estimate_rank(config, rank=world_size - 1, world_size=world_size)
    rank_estimate._profiled_microbatches = lambda _config, count: [count]
    try:
        full = rank_estimate.estimate_rank(config, rank=world_size - 1, world_size=world_size)
    finally:
        rank_estimate._profiled_microbatches = original
    assert full.num_microbatches == microbatches
    return extrapolated, full


def _extrapolated_and_full_depth(case: tuple[int, RunConfig]) -> tuple[Any, Any]:
    """Return the report extrapolated from shallow models, and the report of the full model."""
    from sas_megatron.planning.layout_search import extrapolate_rank
    from sas_megatron.planning.rank_estimate import estimate_rank

    world_size, config = case
    return (
        extrapolate_rank(config, rank=0, world_size=world_size),
        estimate_rank(config, rank=0, world_size=world_size),
    )


def _sums(workload: Any) -> dict[str, float]:
    return {
        "calls": sum(workload.operations.values()),
        "flops": workload.flops,
        "executed_flops": sum(calls * op.executed_flops for op, calls in workload.operations.items()),
        "traffic_bytes": sum(calls * op.traffic_bytes for op, calls in workload.operations.items()),
    }


def _assert_same(extrapolated: Any, full: Any, *, peak_slack_bytes: int, padding: float = 0.0) -> None:
    for phase in ("microbatches", "update"):
        short, long = getattr(extrapolated, phase), getattr(full, phase)
        short_sums, full_sums = _sums(short), _sums(long)
        if padding and phase == "update":
            del short_sums["calls"], full_sums["calls"]
            assert short_sums == pytest.approx(full_sums, rel=SHARDED_STATE)
        else:
            assert short_sums == pytest.approx(full_sums, rel=padding), phase
        short_bytes, full_bytes = short.rounded_bytes_sent(), long.rounded_bytes_sent()
        assert short_bytes.pop("data", {}) == pytest.approx(full_bytes.pop("data", {}), rel=padding), phase
        assert short_bytes == full_bytes, phase
        assert short.collective_calls == long.collective_calls, phase
    for field in ("num_layers", "num_parameters", "parameter_bytes", "gradient_bytes"):
        assert getattr(extrapolated, field) == pytest.approx(getattr(full, field), rel=padding), field
    sharded = SHARDED_STATE if padding else 0.0
    assert extrapolated.optimizer_bytes == pytest.approx(full.optimizer_bytes, rel=sharded)
    peak_slack_bytes += round(sharded * full.optimizer_bytes)
    for field in ("microbatches_peak_bytes", "update_peak_bytes"):
        difference = getattr(extrapolated, field) - getattr(full, field)
        assert abs(difference) <= peak_slack_bytes, f"{field} differs by {difference}"


@pytest.mark.parametrize("layout", cases(LAYOUTS, default=("tensor-data",)))
def test_two_short_steps_determine_a_long_one(separate_process: Any, layout: str) -> None:
    microbatches = 5
    case = _config(layout, num_layers=2, num_microbatches=microbatches)
    extrapolated, full = separate_process(_extrapolated_and_full_step, case, microbatches)
    # The loss report of each microbatch, two float32 numbers, is held until the end of the step.
    _assert_same(extrapolated, full, peak_slack_bytes=64 * microbatches)


@pytest.mark.parametrize("layout", cases(LAYOUTS, default=("context-data",)))
def test_two_shallow_models_determine_a_deep_one(separate_process: Any, layout: str) -> None:
    case = _config(layout, num_layers=5, num_microbatches=1)
    extrapolated, full = separate_process(_extrapolated_and_full_depth, case)
    _assert_same(
        extrapolated, full, peak_slack_bytes=2048, padding=PADDING if layout == "tensor-data" else 0.0
    )
