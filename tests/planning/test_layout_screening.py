"""The rough cost of a layout, term by term, and which weights fit. No torch."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.costs.parameters import count_parameters
from sas_megatron.planning.hardware_file import AttainableShares, Hardware, WireFigures
from sas_megatron.planning.layout_screening import AloneCost, rough_seconds, weights_fit, with_layout
from tests.run_configs import small_config

HARDWARE = Hardware(
    name="made up",
    device="gpu",
    memory_gib=1.0,
    matrix_teraflops={"float32": 1.0},
    memory_gigabytes_per_second=1.0,
    node_wire=WireFigures(gigabytes_per_second=0.002, latency_microseconds=1.0),
    network_wire=WireFigures(gigabytes_per_second=0.0005, latency_microseconds=1.0),
    devices_per_node=4,
    reserved_gib=0.0,
    fragmentation=0.0,
    operation_microseconds=1000.0,
    attainable=AttainableShares(matrix=1.0, convolution=1.0, attention=1.0, memory=1.0, wire=0.5),
)
# Bytes a second that are attained.
NODE, NETWORK = 1e6, 0.25e6
SAS = {"kind": "sas", "num_heads": 4, "head_dim": 6, "simulated_head_dim": 10, "head_expansion": 2}
# 16 samples of 24 tokens.
TOKENS, HIDDEN, LAYERS = 16 * 24, 20, 12


def _config(recompute: str = "none", **parallel: Any) -> Any:
    return small_config(
        attention=SAS,
        model={"num_layers": LAYERS},
        data={"sequence_length": 24},
        parallel=parallel,
        training={"global_batch_size": 16, "micro_batch_size": 2, "recompute": recompute},
    )


def _rough(config: Any, world_size: int, *, seconds_per_token: float = 0.0, operations: float = 0.0) -> float:
    alone = AloneCost(seconds_per_token, operations)
    return rough_seconds(config, alone=alone, world_size=world_size, hardware=HARDWARE)


def _weights(config: Any) -> int:
    return sum(count_parameters(config).values())


def test_computing_is_shared_out_and_waits_for_the_pipeline() -> None:
    assert _rough(_config(), 1, seconds_per_token=0.5) == pytest.approx(0.5 * TOKENS)
    assert _rough(_config("full"), 1, seconds_per_token=0.5) == pytest.approx(0.5 * TOKENS * 4 / 3)
    assert _rough(_config("selective"), 1, seconds_per_token=0.5) == pytest.approx(0.5 * TOKENS * 1.08)
    # Eight microbatches on three stages of two chunks.
    piped = _config(pipeline=3, virtual_pipeline=2)
    assert _rough(piped, 3, seconds_per_token=0.5) == pytest.approx(0.5 * TOKENS / 3 * (1 + 2 / 2 / 8))


def test_starting_operations_is_not_shared_out_among_tensor_ranks() -> None:
    # A hundred operations of a millisecond for each of eight microbatches.
    assert _rough(_config(), 1, seconds_per_token=1e-9, operations=100) == pytest.approx(0.8)
    piped = _config(pipeline=3)
    assert _rough(piped, 3, operations=100) == pytest.approx(0.8 / 3 * (1 + 2 / 8))


def test_tensor_ranks_gather_and_scatter_hidden_states() -> None:
    # Four blocks' ends a layer, forward and backward, a half of each by either of two ranks.
    sent = 8 * LAYERS * TOKENS * HIDDEN * 4 / 2
    assert _rough(_config(tensor=2), 2) == pytest.approx(sent / NODE)
    assert _rough(_config("full", tensor=2), 2) == pytest.approx(4 / 3 * sent / NODE)
    # A third of the layers in each of three stages, and the bubble.
    assert _rough(_config(tensor=2, pipeline=3), 6) == pytest.approx(sent / 3 / NODE * (1 + 2 / 8))


def test_context_ranks_trade_the_simulated_heads() -> None:
    config = _config(context=2)
    heads = 4 * 2 * 10
    # Query, key, value and result, forward and backward.
    sent = 8 * LAYERS * TOKENS / 2 * heads * 4 / 2
    assert _rough(config, 2) == pytest.approx(sent / NODE)
    assert _rough(_config("full", context=2), 2) == pytest.approx(4 / 3 * sent / NODE)
    # Beside four tensor ranks, context ranks are on two nodes, and each trades a quarter of the heads.
    both = _config(tensor=4, context=2)
    hidden = 8 * LAYERS * TOKENS / 2 * HIDDEN * 4 * 3 / 4
    assert _rough(both, 8) == pytest.approx(hidden / NODE + sent / 4 / NETWORK)


def test_data_ranks_exchange_gradients_and_weights() -> None:
    config = _config()
    # Float32 gradients and weights.
    assert _rough(config, 2) == pytest.approx(_weights(config) * 8 / 2 / NODE)
    # Three stages hold a third each, beside each other for all of a step.
    piped = _config(pipeline=3)
    assert _rough(piped, 6) == pytest.approx(_weights(piped) / 3 * 8 / 2 / NODE)
    # Four ranks of one copy of the model are a node, be they tensor or context ranks.
    alone = _rough(_config(tensor=2, context=2), 4)
    shared = alone / 2 + _weights(config) / 2 * 8 / 2 / NETWORK
    assert _rough(_config(tensor=2, context=2), 8) == pytest.approx(shared)
    # Of four tensor ranks the data ranks are on two nodes.
    sharded = _config(tensor=4)
    hidden = 8 * LAYERS * TOKENS / 2 * HIDDEN * 4 * 3 / 4
    assert _rough(sharded, 8) == pytest.approx(hidden / NODE + _weights(sharded) / 4 * 8 / 2 / NETWORK)


def test_weights_fit_with_their_gradients_to_the_byte() -> None:
    config = _config(tensor=2, pipeline=3)
    room = _weights(config) / 6 * (4 + 4)
    for spare, fits in ((1, True), (-1, False)):
        hardware = HARDWARE.model_copy(update={"memory_gib": (room + spare) / 2**30})
        assert weights_fit(config, hardware) == fits


def test_what_follows_from_the_degrees_is_changed_with_them() -> None:
    config = _config(pipeline=2, first_stage_layers=5).replaced(
        {
            "training.recompute": "full",
            "training.recompute_layers": 1,
            "parallel.overlap_gradient_reduce": True,
        }
    )
    shared = with_layout(config, {"parallel.tensor": 2, "parallel.pipeline": 1}, world_size=4)
    assert (shared.parallel.sequence, shared.optimizer.distributed) == (True, True)
    assert shared.parallel.overlap_gradient_reduce
    assert shared.parallel.first_stage_layers is None
    assert shared.training.recompute_layers is None
    alone = with_layout(config, {"parallel.pipeline": 1}, world_size=1)
    assert (alone.parallel.sequence, alone.optimizer.distributed) == (False, False)
    assert not alone.parallel.overlap_gradient_reduce
