"""Claims on a process that has not imported Megatron-core; prints a JSON object with the result of each.

usage: python -m tests.platform.fresh_interpreter

Each function runs in a child process, forked after torch was imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.cuda.nvtx

from sas_megatron.platform.device import peak_memory_bytes


def peak_memory() -> int:
    return peak_memory_bytes(torch.device("cpu"))


def install_beside_cuda() -> dict[str, Any]:
    """What `install` returns and changes where torch sees CUDA."""
    from torch.overrides import _get_current_function_mode_stack

    torch.cuda.is_available = lambda: True
    from sas_megatron.platform import cpu

    places = {"cuda": torch.cuda, "nvtx": torch.cuda.nvtx, "torch": torch, "Tensor": torch.Tensor}
    before = {name: dict(vars(place)) for name, place in places.items()}
    installed = cpu.install()
    after = {name: dict(vars(place)) for name, place in places.items()}
    return {
        "installed": installed,
        "unknown": sorted(set(cpu._stand_ins()) - set(before["cuda"])),
        "changed": [
            f"{place}.{name}"
            for place in places
            for name in before[place].keys() | after[place].keys()
            if before[place].get(name) is not after[place].get(name)
        ],
        "modes": len(_get_current_function_mode_stack()),
        "imports_megatron": "megatron" in sys.modules,
    }


def prepare_as(local_rank: int) -> list[str]:
    """What a rank of a node with four GPUs sets and returns, or the error."""
    from sas_megatron.config.errors import FieldError
    from sas_megatron.platform.device import prepare_device, process_group_backend

    chosen: list[str] = []
    os.environ["LOCAL_RANK"] = str(local_rank)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 4
    torch.cuda.set_device = lambda device: chosen.append(str(device))
    try:
        device = prepare_device()
    except FieldError as error:
        return [str(error)]
    return [*chosen, str(device), process_group_backend(device)]


def in_child(claim: Callable[[], Any]) -> Any:
    """The result of a function in a forked process."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(writer, json.dumps(claim()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return json.loads(text)


if __name__ == "__main__":
    results = {
        "peak_memory": peak_memory(),
        "install_beside_cuda": in_child(install_beside_cuda),
        "last_gpu": in_child(lambda: prepare_as(3)),
        "beyond_the_gpus": in_child(lambda: prepare_as(4)),
    }
    print(json.dumps(results))
