"""What a process says of its device, and the norm that Megatron-core trains without TransformerEngine."""

from __future__ import annotations

import os
from typing import Any

import pytest

from sas_megatron.platform.launcher import launched_world_size

MEBIBYTE = 2**20


def _backend_and_description() -> dict[str, Any]:
    from sas_megatron.platform.device import describe_machine, prepare_device, process_group_backend

    device = prepare_device()
    return {"device": str(device), "backend": process_group_backend(device), **describe_machine(device)}


def test_without_cuda_ranks_join_by_gloo(ranks: Any) -> None:
    (told,) = ranks(1).run(_backend_and_description)
    assert (told["device"], told["backend"]) == ("cpu", "gloo")
    assert told["processors"] == os.cpu_count()
    assert told["processor"] is None or told["processor"].strip()


def _peak_before_and_after(mebibytes: int) -> tuple[int, int, int]:
    import torch

    from sas_megatron.platform.device import peak_memory_bytes

    device = torch.device("cpu")
    before = peak_memory_bytes(device)
    with open("/proc/self/statm", encoding="utf-8") as sizes:
        resident = int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    held = torch.ones(before - resident + mebibytes * MEBIBYTE, dtype=torch.uint8)
    del held
    return resident, before, peak_memory_bytes(device)


def test_peak_memory_holds_what_was_held_at_once(ranks: Any) -> None:
    ((resident, before, after),) = ranks(1).run(_peak_before_and_after, 48)
    assert 100 * MEBIBYTE < resident <= before + 4 * MEBIBYTE
    assert 47 * MEBIBYTE < after - before < 60 * MEBIBYTE


def _norm_marks(normalization: str, sequence_parallel: bool) -> dict[str, tuple[bool, int]]:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    from sas_megatron.platform.norm import ReplicatedNorm

    config = TransformerConfig(
        num_layers=1,
        hidden_size=20,
        num_attention_heads=2,
        normalization=normalization,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float64,
        layernorm_epsilon=0.25,
    )
    norm = ReplicatedNorm(config, 20, eps=config.layernorm_epsilon)
    x = torch.arange(20.0, dtype=torch.float64)
    centred = x - x.mean() if normalization == "LayerNorm" else x
    expected = centred / (centred.square().mean() + 0.25).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    return {
        name: (parameter.sequence_parallel, parameter.numel()) for name, parameter in norm.named_parameters()
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_weights_are_marked_for_sequence_parallelism(ranks: Any, sequence_parallel: bool) -> None:
    mark = (sequence_parallel, 20)
    assert ranks(1).run(_norm_marks, "RMSNorm", sequence_parallel) == [{"weight": mark}]
    assert ranks(1).run(_norm_marks, "LayerNorm", sequence_parallel) == [{"weight": mark, "bias": mark}]


def test_the_launcher_tells_the_world_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert launched_world_size() == 6
