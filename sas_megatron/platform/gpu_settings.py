"""Process-wide settings of CUDA, cuBLAS, NCCL and torch that follow from a run's config.

The environment variables are read when a process first uses the GPU or creates an NCCL communicator.
"""

from __future__ import annotations

import os

import torch

from sas_megatron.config.errors import FieldError
from sas_megatron.config.training import TrainingConfig

# The algorithms whose sums have a fixed order, as Megatron-LM requires them for its deterministic mode. NCCL
# otherwise may reduce in the switch (NVLS), where the order varies.
DETERMINISTIC_NCCL_ALGORITHMS = ("^NVLS", "Tree", "Ring", "CollnetDirect", "CollnetChain")


def apply_gpu_settings(training: TrainingConfig) -> None:
    """Set the variables that the user has not set, and torch's determinism. It precedes all work on the GPU.

    With Megatron-core's engine, one hardware queue keeps communication in the order in which Megatron-core
    issues it beside computation. DeepSpeed overlaps with streams of its own, which one queue would serialize.

    Raises:
        FieldError: `training.deterministic=true`, and NCCL_ALGO names an algorithm that is not deterministic.
    """
    if training.engine == "megatron":
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.use_deterministic_algorithms(training.deterministic)
    if not training.deterministic:
        return
    # Every tensor is written before it is read, so that filling it would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no stub
    # cuBLAS is deterministic only with workspaces of fixed size (its manual, "Results reproducibility").
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    algorithm = os.environ.setdefault("NCCL_ALGO", DETERMINISTIC_NCCL_ALGORITHMS[0])
    if algorithm not in DETERMINISTIC_NCCL_ALGORITHMS:
        raise FieldError(
            "NCCL_ALGO",
            algorithm,
            "may sum in a varying order, and training.deterministic=true",
            f"unset it, or use one of {', '.join(DETERMINISTIC_NCCL_ALGORITHMS)}",
        )
