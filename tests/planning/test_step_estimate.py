"""The seconds of a step from made-up reports, computed by hand. No torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sas_megatron.costs.flops import count_training_flops
from sas_megatron.planning.hardware_file import AttainableShares, Hardware, WireFigures
from sas_megatron.planning.step_estimate import estimate_step, working_seconds
from sas_megatron.planning.tally import Operation, Tally
from tests.run_configs import small_config

HARDWARE = Hardware(
    name="made up",
    device="gpu",
    memory_gib=1.0,
    matrix_teraflops={"float32": 2.0, "bfloat16": 5.0},
    memory_gigabytes_per_second=100.0,
    node_wire=WireFigures(gigabytes_per_second=10.0, latency_microseconds=3.0),
    network_wire=WireFigures(gigabytes_per_second=2.0, latency_microseconds=7.0),
    devices_per_node=4,
    reserved_gib=0.0,
    fragmentation=0.0,
    operation_microseconds=11.0,
    attainable=AttainableShares(matrix=0.5, convolution=0.25, attention=0.4, memory=0.8, wire=0.5),
)
CPU = HARDWARE.model_copy(update={"device": "cpu"})


def _operation(kind: Any, *, flops: int = 0, executed: int = 0, traffic: int = 0) -> Operation:
    return Operation(kind, kind, "float32", flops, executed, traffic)


def _report(*, microbatches: Tally, update: Tally | None = None, num_microbatches: int = 3) -> Any:
    """The part of a `RankReport` that the estimate reads."""
    groups = {"tensor": [0, 1], "pipeline": [0, 8, 16], "data": [0, 2, 4], "other": list(range(24))}
    return SimpleNamespace(
        group_ranks=groups,
        microbatches=microbatches,
        update=update or Tally(),
        num_microbatches=num_microbatches,
    )


# 4 s: 4e12 FLOPs at half of 2 TFLOP/s.
FOUR_SECONDS = Tally({_operation("matrix", flops=1, executed=4 * 10**12): 1.0})


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
    ids=["moved", "matrix", "convolution", "attention", "moved longer than multiplied"],
)
def test_an_operation_takes_the_longer_of_computing_and_moving(operation: Operation, seconds: float) -> None:
    assert working_seconds(operation, HARDWARE) == pytest.approx(seconds)


def test_a_gpu_starts_operations_while_it_works_and_a_cpu_does_not() -> None:
    many = Tally({_operation("elementwise", traffic=8_000_000): 1000.0})  # 0.1 ms each
    few = Tally({_operation("elementwise", traffic=80): 1000.0})
    for hardware, of_many, of_few in ((HARDWARE, 0.1, 0.011), (CPU, 0.111, 0.011001)):
        of = _estimate(_report(microbatches=many), hardware=hardware).terms_seconds
        assert of == {"compute": pytest.approx(of_many)}
        assert _estimate(_report(microbatches=few), hardware=hardware).seconds == pytest.approx(of_few)
    update = _report(microbatches=Tally(), update=few)
    # A GPU updates lists of tensors, a CPU tensor by tensor.
    assert _estimate(update).terms_seconds == {"update": pytest.approx(1e-6)}
    assert _estimate(update, hardware=CPU).terms_seconds == {"update": pytest.approx(0.011001)}


def test_a_pipeline_waits_for_its_slowest_stage() -> None:
    fast, slow = _report(microbatches=FOUR_SECONDS * 0.5), _report(microbatches=FOUR_SECONDS)
    for reports in ((fast, slow), (slow, fast)):
        estimate = _estimate(*reports, pipeline=2, virtual_pipeline=2)
        # (p-1)/v·m = 1/6 of the busy time.
        assert estimate.bubble == pytest.approx(1 / 6)
        assert estimate.terms_seconds == {"compute": pytest.approx(4), "bubble": pytest.approx(4 / 6)}
        assert estimate.seconds == pytest.approx(4 + 4 / 6)
        # Four samples of twelve tokens.
        assert estimate.tokens == 48
        assert estimate.tokens_per_second == pytest.approx(48 / (4 + 4 / 6))


def test_the_models_flops_are_set_against_the_peak_of_all_devices() -> None:
    estimate = _estimate(_report(microbatches=FOUR_SECONDS))
    flops = 48 * sum(count_training_flops(small_config(model={"num_layers": 4})).values())
    assert estimate.model_flops_utilization == pytest.approx(flops / 4 / (24 * 2e12))


def test_each_group_takes_its_bytes_and_a_latency_for_each_doubling() -> None:
    microbatches = Tally(
        wire_bytes={
            "tensor": {"allreduce": 10e9, "allgather": 5e9},
            "pipeline": {"send": 3e9},
            "other": {"allreduce": 1e9},
        },
        wire_calls={
            "tensor": {"allreduce": 1000.0, "allgather": 2000.0},
            "pipeline": {"send": 5000.0},
            "other": {"allreduce": 1000.0},
        },
    )
    update = Tally(wire_bytes={"tensor": {"allreduce": 5e9}}, wire_calls={"tensor": {"allreduce": 1000.0}})
    report = _report(microbatches=microbatches, update=update)
    assert _estimate(report).terms_seconds == {
        # Two ranks of a node, one hop of 3 µs in 3,000 calls, and in 1,000 of the update.
        "tensor": pytest.approx(2 + 1 + 0.009 + 1 + 0.003),
        # Three nodes; a message goes to its receiver in one hop.
        "pipeline": pytest.approx(3 + 0.035),
        # 24 ranks are five doublings.
        "other": pytest.approx(1 + 0.035),
    }


# Over the network, at 1 GB/s; a thousand calls among three ranks are two hops of 7 µs each.
DATA = {"allreduce": 8e9, "reducescatter": 1e9, "allgather": 6e9}


@pytest.mark.parametrize(
    ("parallel", "seconds"),
    [
        ({}, 9.028 + 6.014),
        # Two thirds of 6 s a microbatch behind the reduction, and a third behind the gathering.
        ({"overlap_gradient_reduce": True}, 9.028 - 4 + 6.014),
        ({"overlap_gradient_reduce": True, "overlap_parameter_gather": True}, 9.028 - 4 + 6.014 - 2),
    ],
    ids=["none", "reduction", "both"],
)
def test_an_overlap_hides_a_share_of_the_last_microbatch(parallel: dict[str, Any], seconds: float) -> None:
    tally = Tally(wire_bytes={"data": DATA}, wire_calls={"data": dict.fromkeys(DATA, 1000.0)})
    report = _report(microbatches=FOUR_SECONDS * 4.5 + tally)
    config = small_config(parallel=parallel, optimizer={"learning_rate": 0.01, "distributed": True})
    estimate = estimate_step(config, [report], hardware=HARDWARE, world_size=24)
    assert estimate.terms_seconds == {"compute": pytest.approx(18), "data": pytest.approx(seconds)}


def test_an_overlap_hides_behind_a_microbatch_without_the_bubble() -> None:
    tally = Tally(wire_bytes={"data": {"reducescatter": 9e9}}, wire_calls={"data": {"reducescatter": 1.0}})
    report = _report(microbatches=FOUR_SECONDS * 4.5 + tally)
    estimate = _estimate(report, pipeline=2, overlap_gradient_reduce=True)
    assert estimate.terms_seconds["data"] == pytest.approx(9 - 4, rel=1e-4)


def test_an_overlap_hides_no_more_than_the_exchange() -> None:
    tally = Tally(wire_bytes={"data": {"reducescatter": 1e9}}, wire_calls={"data": {"reducescatter": 1.0}})
    estimate = _estimate(_report(microbatches=FOUR_SECONDS * 3 + tally), overlap_gradient_reduce=True)
    assert estimate.terms_seconds == {"compute": pytest.approx(12)}
