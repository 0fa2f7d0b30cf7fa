"""Which ranks of a run are simulated, and with which attention."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.planning.toy_machines import toy_machine
from tests.run_configs import small_config


def _stage_ranks(config: RunConfig, world_size: int) -> list[int]:
    from sas_megatron.planning.run_estimate import stage_ranks

    return stage_ranks(config, world_size)


def _on_hardware(config: RunConfig, device: str) -> Any:
    from sas_megatron.planning.run_estimate import adapt_to_hardware

    machine = toy_machine(memory_gib=1.0, wire_gigabytes_per_second=1.0)
    return adapt_to_hardware(config, machine.model_copy(update={"device": device})).attention


@pytest.mark.parametrize(("stages", "ranks"), [(1, [0]), (2, [0, 12]), (3, [0, 8, 16]), (4, [0, 6, 18])])
def test_the_first_rank_of_the_first_second_and_last_stage_is_simulated(
    separate_process: Any, stages: int, ranks: list[int]
) -> None:
    config = small_config(model={"num_layers": 12}, parallel={"pipeline": stages, "tensor": 2})
    assert separate_process(_stage_ranks, config, 24) == ranks


def test_a_gpu_runs_fused_kernels_and_the_simulation_its_plain_form(separate_process: Any) -> None:
    attention = {"kind": "sas", "num_heads": 3, "head_dim": 8, "simulated_head_dim": 16, "dropout": 0.1}
    for backend, device, simulated in (
        ("auto", "gpu", ("fused", 0.0)),
        ("cudnn", "gpu", ("fused", 0.0)),
        ("unfused", "gpu", ("unfused", 0.1)),
        ("auto", "cpu", ("auto", 0.1)),
    ):
        config = small_config(attention={**attention, "backend": backend}, training={"precision": "bfloat16"})
        chosen = separate_process(_on_hardware, config, device)
        assert (chosen.backend, chosen.dropout) == simulated, f"{backend} on a {device}"
        assert chosen.kernel == "plain"
