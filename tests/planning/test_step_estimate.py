"""The time of a step, from synthetic reports, equals a computation by hand. No torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sas_megatron.costs.flops import count_training_flops
from sas_megatron.planning.hardware_file import AttainableShares, Hardware, LinkFigures
from sas_megatron.planning.step_estimate import estimate_step, execution_seconds
from sas_megatron.planning.workload import Operation, Workload
from tests.planning.toy_machines import toy_machine
from tests.run_configs import small_config

HARDWARE = toy_machine(
    matrix_teraflops={"float32": 2.0, "bfloat16": 5.0},
    memory_gigabytes_per_second=100.0,
    node_link=LinkFigures(gigabytes_per_second=10.0, latency_microseconds=3.0),
    network_link=LinkFigures(gigabytes_per_second=2.0, latency_microseconds=7.0),
    devices_per_node=4,
    operation_microseconds=11.0,
    attainable=AttainableShares(matrix=0.5, convolution=0.25, attention=0.4, memory=0.8, link=0.5),
)
CPU = HARDWARE.model_copy(update={"device": "cpu"})


def _operation(kind: Any, *, flops: int = 0, executed: int = 0, traffic: int = 0) -> Operation:
    return Operation(kind, kind, "float32", flops, executed, traffic)


def _report(*, microbatches: Workload, update: Workload | None = None, num_microbatches: int = 3) -> Any:
    """Return the fields of a `RankReport` that the estimate reads."""
    groups = {"tensor": [0, 1], "pipeline": [0, 8, 16], "data": [0, 2, 4], "other": list(range(24))}
    return SimpleNamespace(
        group_ranks=groups,
        microbatches=microbatches,
        update=update or Workload(),
        num_microbatches=num_microbatches,
    )


# 4 s: 4e12 FLOPs at half of 2 TFLOP/s.
FOUR_SECONDS = Workload({_operation("matrix", flops=1, executed=4 * 10**12): 1.0})


def _estimate(report: Any, *others: Any, hardware: Hardware = HARDWARE, **parallel: Any) -> Any:
    config = small_config(model={"num_layers": 4}, parallel=parallel)
    return estimate_step(config, [report, *others], hardware=hardware, world_size=24)


@pytest.mark.parametrize(
    ("operation", "seconds"),
    [
        (_operation("elementwise", executed=10**15, traffic=160 * 10**9), 2.0),
        (_operation("matrix", flops=1, executed=3 * 10**12), 3.0),
        (_operation("convolution", executed=3 * 10**12), 6.0),
        (_operation("attention", executed=4 * 10**12), 5.0),
        (_operation("matrix", executed=1, traffic=80 * 10**9), 1.0),
    ],
    ids=["elementwise", "matrix", "convolution", "attention", "matrix bound by memory"],
)
def test_an_operation_takes_the_longer_of_compute_and_memory_time(
    operation: Operation, seconds: float
) -> None:
    assert execution_seconds(operation, HARDWARE) == pytest.approx(seconds)


def test_launches_overlap_with_execution_on_a_gpu_but_not_on_a_cpu() -> None:
    large = Workload({_operation("elementwise", traffic=8_000_000): 1000.0})  # 0.1 ms each
    small = Workload({_operation("elementwise", traffic=80): 1000.0})
    for hardware, large_seconds, small_seconds in ((HARDWARE, 0.1, 0.011), (CPU, 0.111, 0.011001)):
        terms = _estimate(_report(microbatches=large), hardware=hardware).terms_seconds
        assert terms == {"compute": pytest.approx(large_seconds)}
        seconds = _estimate(_report(microbatches=small), hardware=hardware).seconds
        assert seconds == pytest.approx(small_seconds)
    update = _report(microbatches=Workload(), update=small)
    assert _estimate(update).terms_seconds == {"update": pytest.approx(0.011)}
    assert _estimate(update, hardware=CPU).terms_seconds == {"update": pytest.approx(0.011001)}


def test_a_pipeline_waits_for_its_slowest_stage() -> None:
    fast, slow = _report(microbatches=FOUR_SECONDS * 0.5), _report(microbatches=FOUR_SECONDS)
    for reports in ((fast, slow), (slow, fast)):
        estimate = _estimate(*reports, pipeline=2, virtual_pipeline=2)
        # (p-1)/(v·m) = 1/6 of the busy time.
        assert estimate.bubble == pytest.approx(1 / 6)
        assert estimate.terms_seconds == {"compute": pytest.approx(4), "bubble": pytest.approx(4 / 6)}
        assert estimate.seconds == pytest.approx(4 + 4 / 6)
        # Four samples of twelve tokens.
        assert estimate.tokens == 48
        assert estimate.tokens_per_second == pytest.approx(48 / (4 + 4 / 6))


def test_utilization_is_model_flops_over_the_peak_of_all_devices() -> None:
    estimate = _estimate(_report(microbatches=FOUR_SECONDS))
    flops = 48 * sum(count_training_flops(small_config(model={"num_layers": 4})).values())
    assert estimate.model_flops_utilization == pytest.approx(flops / 4 / (24 * 2e12))


def test_communication_takes_its_bytes_and_a_latency_for_each_doubling_of_the_ranks() -> None:
    microbatches = Workload(
        bytes_sent={
            "tensor": {"allreduce": 10e9, "allgather": 5e9},
            "pipeline": {"send": 3e9},
            "other": {"allreduce": 1e9},
        },
        collective_calls={
            "tensor": {"allreduce": 1000.0, "allgather": 2000.0},
            "pipeline": {"send": 5000.0},
            "other": {"allreduce": 1000.0},
        },
    )
    update = Workload(
        bytes_sent={"tensor": {"allreduce": 5e9}}, collective_calls={"tensor": {"allreduce": 1000.0}}
    )
    report = _report(microbatches=microbatches, update=update)
    assert _estimate(report).terms_seconds == {
        # Two ranks of a node: one hop of 3 µs in each of 3,000 calls, and of 1,000 calls of the update.
        "tensor": pytest.approx(2 + 1 + 0.009 + 1 + 0.003),
        # Ranks on three nodes; a message takes one hop.
        "pipeline": pytest.approx(3 + 0.035),
        # 24 ranks are five doublings.
        "other": pytest.approx(1 + 0.035),
    }


# The network attains 1 GB/s. Each of a thousand calls among three ranks takes two hops of 7 µs.
DATA = {"allreduce": 8e9, "reducescatter": 1e9, "allgather": 6e9}


@pytest.mark.parametrize(
    ("parallel", "seconds"),
    [
        ({}, 9.028 + 6.014),
        # Two thirds of the 6 s of a microbatch overlap with the reduction, one third with the all-gather.
        ({"overlap_gradient_reduce": True}, 9.028 - 4 + 6.014),
        ({"overlap_gradient_reduce": True, "overlap_parameter_gather": True}, 9.028 - 4 + 6.014 - 2),
    ],
    ids=["none", "reduction", "both"],
)
def test_an_overlap_hides_communication_behind_a_share_of_the_last_microbatch(
    parallel: dict[str, Any], seconds: float
) -> None:
    exchange = Workload(bytes_sent={"data": DATA}, collective_calls={"data": dict.fromkeys(DATA, 1000.0)})
    report = _report(microbatches=FOUR_SECONDS * 4.5 + exchange)
    config = small_config(parallel=parallel, optimizer={"learning_rate": 0.01, "distributed": True})
    estimate = estimate_step(config, [report], hardware=HARDWARE, world_size=24)
    assert estimate.terms_seconds == {"compute": pytest.approx(18), "data": pytest.approx(seconds)}


def test_the_bubble_does_not_hide_communication() -> None:
    exchange = Workload(
        bytes_sent={"data": {"reducescatter": 9e9}}, collective_calls={"data": {"reducescatter": 1.0}}
    )
    report = _report(microbatches=FOUR_SECONDS * 4.5 + exchange)
    estimate = _estimate(report, pipeline=2, overlap_gradient_reduce=True)
    assert estimate.terms_seconds["data"] == pytest.approx(9 - 4, rel=1e-4)


def test_an_overlap_does_not_make_communication_negative() -> None:
    exchange = Workload(
        bytes_sent={"data": {"reducescatter": 1e9}}, collective_calls={"data": {"reducescatter": 1.0}}
    )
    estimate = _estimate(_report(microbatches=FOUR_SECONDS * 3 + exchange), overlap_gradient_reduce=True)
    assert estimate.terms_seconds == {"compute": pytest.approx(12)}
