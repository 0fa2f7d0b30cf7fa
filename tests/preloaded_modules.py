"""Import the modules of forked test processes once, in the fork server (see `tests/fork_server.py`)."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys

MODULES = (
    "sas_megatron.attention.mfa.layer",
    "sas_megatron.attention.mla.layer",
    "sas_megatron.attention.sas.layer",
    "sas_megatron.checkpoint.saving",
    "sas_megatron.cli.main",
    "sas_megatron.evaluation.model_source",
    "sas_megatron.evaluation.trained_model",
    "sas_megatron.planning.rank_estimate",
    "sas_megatron.training.deepspeed_engine",
    "sas_megatron.training.loop",
    "sas_megatron.training.megatron_engine",
    "sas_megatron.training.entry",
    # The first optimizer of a process imports it.
    "torch._dynamo",
    "torch.profiler",
)
DEEPSPEED_MODULES = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
)


def _import_all() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from sas_megatron.platform.device import prepare_device

    torch.set_num_threads(1)
    # Must precede the import of Megatron-core, which requires the CPU replacement for CUDA calls.
    device = prepare_device()
    for module in MODULES:
        importlib.import_module(module)
    if device.type == "cpu":
        # `training/deepspeed_engine.py` sets it as well. DeepSpeed chooses its accelerator only once.
        os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed's autotuner imports MLflow if it is installed, and with it libraries that start threads.
        sys.modules["mlflow"] = None  # type: ignore[assignment]
        for module in DEEPSPEED_MODULES:
            importlib.import_module(module)
        del sys.modules["mlflow"]
        del os.environ["DS_ACCELERATOR"]
    # Otherwise a garbage collection in a forked process would visit, and so copy, the imported objects.
    gc.freeze()
    atexit.register(gc.unfreeze)


_import_all()
