"""Checks in a process that has not imported Megatron-core; prints their results as a JSON object.

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


def install_with_cuda() -> dict[str, Any]:
    """Return the result of `install` on a machine with CUDA, and everything that it changes."""
    from torch.overrides import _get_current_function_mode_stack

    torch.cuda.is_available = lambda: True
    from sas_megatron.platform import cpu

    modules = {"cuda": torch.cuda, "nvtx": torch.cuda.nvtx, "torch": torch, "Tensor": torch.Tensor}
    before = {name: dict(vars(module)) for name, module in modules.items()}
    installed = cpu.install()
    after = {name: dict(vars(module)) for name, module in modules.items()}
    return {
        "installed": installed,
        "unknown": sorted(set(cpu._replacements()) - set(before["cuda"])),
        "changed": [
            f"{module}.{name}"
            for module in modules
            for name in before[module].keys() | after[module].keys()
            if before[module].get(name) is not after[module].get(name)
        ],
        "modes": len(_get_current_function_mode_stack()),
        "imports_megatron": "megatron" in sys.modules,
    }


def prepare_as(local_rank: int) -> list[str]:
    """Return the devices that a rank of a node with four GPUs sets and returns, or the error."""
    from sas_megatron.config.errors import FieldError
    from sas_megatron.platform.device import prepare_device, process_group_backend

    selected: list[str] = []
    os.environ["LOCAL_RANK"] = str(local_rank)
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 4
    torch.cuda.set_device = lambda device: selected.append(str(device))
    try:
        device = prepare_device()
    except FieldError as error:
        return [str(error)]
    return [*selected, str(device), process_group_backend(device)]


def in_child(function: Callable[[], Any]) -> Any:
    """Return the result of a function in a forked process."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(writer, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as result:
        text = result.read()
    os.waitpid(pid, 0)
    return json.loads(text)


if __name__ == "__main__":
    results = {
        "peak_memory": peak_memory(),
        "install_with_cuda": in_child(install_with_cuda),
        "last_gpu": in_child(lambda: prepare_as(3)),
        "beyond_the_gpus": in_child(lambda: prepare_as(4)),
    }
    print(json.dumps(results))
