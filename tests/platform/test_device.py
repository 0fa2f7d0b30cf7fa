"""The device of a process: backend, description, peak memory and world size."""

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


def test_the_backend_without_cuda_is_gloo(ranks: Any) -> None:
    (reported,) = ranks(1).run(_backend_and_description)
    assert (reported["device"], reported["backend"]) == ("cpu", "gloo")
    assert reported["processors"] == os.cpu_count()
    assert reported["processor"] is None or reported["processor"].strip()


def _peak_before_and_after(mebibytes: int) -> tuple[int, int, int]:
    import torch

    from sas_megatron.platform.device import peak_memory_bytes

    device = torch.device("cpu")
    before = peak_memory_bytes(device)
    with open("/proc/self/statm", encoding="utf-8") as sizes:
        resident = int(sizes.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    allocated = torch.ones(before - resident + mebibytes * MEBIBYTE, dtype=torch.uint8)
    del allocated
    return resident, before, peak_memory_bytes(device)


def test_peak_memory_includes_memory_that_was_freed(ranks: Any) -> None:
    ((resident, before, after),) = ranks(1).run(_peak_before_and_after, 48)
    assert 100 * MEBIBYTE < resident <= before + 4 * MEBIBYTE
    assert 47 * MEBIBYTE < after - before < 60 * MEBIBYTE


def test_the_world_size_is_read_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launched_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert launched_world_size() == 6
