"""Import once, in the fork server, what the processes that it forks need (see `tests/fork_server.py`)."""

from __future__ import annotations

import importlib
import os

MODULES = (
    "sas_megatron.attention.simulated_layer",
    "sas_megatron.checkpoint.saving",
    "sas_megatron.cli.main",
    "sas_megatron.evaluation.start",
    "sas_megatron.evaluation.trained_model",
    "sas_megatron.planning.rank_simulation",
    "sas_megatron.training.loop",
    "sas_megatron.training.start",
    # Imported by the first optimizer that a process builds.
    "torch._dynamo",
)


def _import_all() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from sas_megatron.platform.device import prepare_device

    torch.set_num_threads(1)
    # Before Megatron-core is imported, which must find the CPU's stand-in.
    prepare_device()
    for module in MODULES:
        importlib.import_module(module)


_import_all()
