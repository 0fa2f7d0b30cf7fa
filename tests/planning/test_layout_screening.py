"""The rough cost of a layout, term by term, and the weights that fit into memory. No torch."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.costs.parameters import count_parameters
from sas_megatron.planning.hardware_file import AttainableShares, LinkFigures
from sas_megatron.planning.layout_screening import SingleDeviceCost, rough_seconds, weights_fit, with_layout
from tests.planning.toy_machines import toy_machine
from tests.run_configs import small_config

HARDWARE = toy_machine(
    node_link=LinkFigures(gigabytes_per_second=0.002, latency_microseconds=1.0),
    network_link=LinkFigures(gigabytes_per_second=0.0005, latency_microseconds=1.0),
    devices_per_node=4,
    operation_microseconds=1000.0,
    attainable=AttainableShares(matrix=1.0, convolution=1.0, attention=1.0, memory=1.0, link=0.5),
)
# Attained bytes per second within a node and between nodes.
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
    cost = SingleDeviceCost(seconds_per_token, operations)
    return rough_seconds(config, single_device=cost, world_size=world_size, hardware=HARDWARE)


def _weights(config: Any) -> int:
    return sum(count_parameters(config).values())


def test_compute_is_divided_among_ranks_and_waits_for_the_pipeline() -> None:
    assert _rough(_config(), 1, seconds_per_token=0.5) == pytest.approx(0.5 * TOKENS)
    assert _rough(_config("full"), 1, seconds_per_token=0.5) == pytest.approx(0.5 * TOKENS * 4 / 3)
    assert _rough(_config("selective"), 1, seconds_per_token=0.5) == pytest.approx(0.5 * TOKENS * 1.08)
    # Eight microbatches on three stages of two chunks.
    piped = _config(pipeline=3, virtual_pipeline=2)
    assert _rough(piped, 3, seconds_per_token=0.5) == pytest.approx(0.5 * TOKENS / 3 * (1 + 2 / 2 / 8))


def test_launch_time_is_divided_among_pipeline_stages() -> None:
    # A hundred launches of a millisecond for each of eight microbatches.
    assert _rough(_config(), 1, seconds_per_token=1e-9, operations=100) == pytest.approx(0.8)
    piped = _config(pipeline=3)
    assert _rough(piped, 3, operations=100) == pytest.approx(0.8 / 3 * (1 + 2 / 8))


def test_tensor_ranks_gather_and_scatter_hidden_states() -> None:
    # Four messages per layer forward and four backward, of which each of two ranks sends a half.
    sent = 8 * LAYERS * TOKENS * HIDDEN * 4 / 2
    assert _rough(_config(tensor=2), 2) == pytest.approx(sent / NODE)
    assert _rough(_config("full", tensor=2), 2) == pytest.approx(4 / 3 * sent / NODE)
    # Each of three stages has a third of the layers; the bubble comes on top.
    assert _rough(_config(tensor=2, pipeline=3), 6) == pytest.approx(sent / 3 / NODE * (1 + 2 / 8))


def test_context_ranks_exchange_the_simulated_heads() -> None:
    config = _config(context=2)
    heads = 4 * 2 * 10
    # Query, key, value and attention output, forward and backward.
    sent = 8 * LAYERS * TOKENS / 2 * heads * 4 / 2
    assert _rough(config, 2) == pytest.approx(sent / NODE)
    assert _rough(_config("full", context=2), 2) == pytest.approx(4 / 3 * sent / NODE)
    # With four tensor ranks per node, context ranks are on two nodes. Each exchanges a quarter of the heads.
    both = _config(tensor=4, context=2)
    hidden = 8 * LAYERS * TOKENS / 2 * HIDDEN * 4 * 3 / 4
    assert _rough(both, 8) == pytest.approx(hidden / NODE + sent / 4 / NETWORK)


def test_data_ranks_exchange_gradients_and_weights() -> None:
    config = _config()
    # Gradients and weights in float32.
    assert _rough(config, 2) == pytest.approx(_weights(config) * 8 / 2 / NODE)
    # Each of three stages exchanges a third, all at the same time.
    piped = _config(pipeline=3)
    assert _rough(piped, 6) == pytest.approx(_weights(piped) / 3 * 8 / 2 / NODE)
    # The four tensor and context ranks of a model replica fill a node.
    one_replica = _rough(_config(tensor=2, context=2), 4)
    two_replicas = one_replica / 2 + _weights(config) / 2 * 8 / 2 / NETWORK
    assert _rough(_config(tensor=2, context=2), 8) == pytest.approx(two_replicas)
    # With four tensor ranks per node, data ranks are on two nodes.
    sharded = _config(tensor=4)
    hidden = 8 * LAYERS * TOKENS / 2 * HIDDEN * 4 * 3 / 4
    assert _rough(sharded, 8) == pytest.approx(hidden / NODE + _weights(sharded) / 4 * 8 / 2 / NETWORK)


def test_weights_and_gradients_that_exceed_memory_by_a_byte_do_not_fit() -> None:
    config = _config(tensor=2, pipeline=3)
    needed = _weights(config) / 6 * (4 + 4)
    for spare, fits in ((1, True), (-1, False)):
        hardware = HARDWARE.model_copy(update={"memory_gib": (needed + spare) / 2**30})
        assert weights_fit(config, hardware) == fits


def test_fields_that_depend_on_the_degrees_change_with_them() -> None:
    config = _config(pipeline=2, first_stage_layers=5).replaced(
        {
            "training.recompute": "full",
            "training.recompute_layers": 1,
            "parallel.overlap_gradient_reduce": True,
        }
    )
    sharded = with_layout(config, {"parallel.tensor": 2, "parallel.pipeline": 1}, world_size=4)
    assert (sharded.parallel.sequence, sharded.optimizer.distributed) == (True, True)
    assert sharded.parallel.overlap_gradient_reduce
    assert sharded.parallel.first_stage_layers is None
    assert sharded.training.recompute_layers is None
    single = with_layout(config, {"parallel.pipeline": 1}, world_size=1)
    assert (single.parallel.sequence, single.optimizer.distributed) == (False, False)
    assert not single.parallel.overlap_gradient_reduce
