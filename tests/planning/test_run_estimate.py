"""The ranks of a run that are estimated, and the attention with which they are estimated."""

from __future__ import annotations

from typing import Any

import pytest

from sas_megatron.config.run import RunConfig
from tests.planning.toy_machines import toy_machine
from tests.run_configs import small_config


def _stage_ranks(config: RunConfig, world_size: int) -> list[int]:
    from sas_megatron.planning.run_estimate import stage_ranks

    return stage_ranks(config, world_size)


def _attention_on(config: RunConfig, device: str) -> Any:
    from sas_megatron.planning.run_estimate import adapt_to_hardware

    return adapt_to_hardware(config, toy_machine(device=device)).attention


@pytest.mark.parametrize(("stages", "ranks"), [(1, [0]), (2, [0, 12]), (3, [0, 8, 16]), (4, [0, 6, 18])])
def test_the_first_rank_of_the_first_second_and_last_stage_is_estimated(
    separate_process: Any, stages: int, ranks: list[int]
) -> None:
    config = small_config(model={"num_layers": 12}, parallel={"pipeline": stages, "tensor": 2})
    assert separate_process(_stage_ranks, config, 24) == ranks


def test_a_gpu_is_estimated_with_fused_attention_and_plain_sas_kernels(separate_process: Any) -> None:
    attention = {"kind": "sas", "num_heads": 3, "head_dim": 8, "simulated_head_dim": 16, "dropout": 0.125}
    for backend, device, estimated in (
        ("auto", "gpu", ("fused", 0.0)),
        ("cudnn", "gpu", ("fused", 0.0)),
        ("unfused", "gpu", ("unfused", 0.125)),
        ("auto", "cpu", ("auto", 0.125)),
    ):
        config = small_config(attention={**attention, "backend": backend}, training={"precision": "bfloat16"})
        adapted = separate_process(_attention_on, config, device)
        assert (adapted.backend, adapted.dropout) == estimated, f"{backend} on a {device}"
        assert adapted.kernel == "plain"
