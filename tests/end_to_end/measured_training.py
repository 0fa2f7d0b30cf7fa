"""Train like `sas-megatron train CONFIG`, and count the bytes that the network interface sends.

usage: python -m tests.end_to_end.measured_training NAMESPACE INTERFACE FILE NUM_STEPS CONFIG

The process enters the network namespace first. It writes to FILE-RANK the number of bytes sent between a
barrier before the first step and a barrier after step NUM_STEPS.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

from sas_megatron.config.loading import load_run_config
from sas_megatron.platform.device import prepare_device

CLONE_NEWNET = 0x40000000


def enter_namespace(name: str) -> None:
    with open(f"/run/netns/{name}") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter network namespace {name}")


def bytes_sent(interface: str) -> int:
    """Return the number of bytes that the interface of the current namespace has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise ValueError(f"{interface}: there is no such network interface")


if __name__ == "__main__":
    namespace, interface, path, num_steps, config = sys.argv[1:]
    enter_namespace(namespace)
    prepare_device()
    import torch.distributed as dist

    from sas_megatron.training import entry, loop

    train_step, readings, finished_steps = loop.train_step, list[int](), 0

    def read() -> None:
        dist.barrier()
        readings.append(bytes_sent(interface))

    def measured_step(*args: Any, **kwargs: Any) -> Any:
        global finished_steps
        if not readings:
            read()
        result = train_step(*args, **kwargs)
        finished_steps += 1
        if finished_steps == int(num_steps):
            read()
        return result

    loop.train_step = measured_step
    entry.train(load_run_config(config))
    Path(f"{path}-{os.environ['RANK']}").write_text(f"{readings[1] - readings[0]}\n")
