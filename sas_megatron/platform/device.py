"""The device of this process, and its process-group backend."""

from __future__ import annotations

import os
import warnings

import torch

from sas_megatron.config.errors import FieldError
from sas_megatron.platform import cpu
from sas_megatron.platform.local_machine import describe_processor, read_memory_bytes
from sas_megatron.platform.transformer_engine_fallbacks import install_fused_rope


def prepare_device() -> torch.device:
    """Select the device of this process and prepare Megatron-core for it, before Megatron-core is imported.

    Returns:
        The CUDA device with number LOCAL_RANK, or the CPU (with `platform.cpu` installed) if torch finds no
        CUDA device.

    Raises:
        FieldError: LOCAL_RANK is not below the number of GPUs of this node.
    """
    # On every rank Megatron-core warns about optional packages that are not installed, and calls collectives
    # by names that newer versions of torch deprecate. Users can change neither.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed.*` is deprecated")
    on_cpu = cpu.install()
    install_fused_rope()
    if on_cpu:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise FieldError(
            "LOCAL_RANK",
            local_rank,
            f"must be below the number of GPUs of this node, {torch.cuda.device_count()}",
            "start one process per GPU, or set CUDA_VISIBLE_DEVICES= to compute on the CPU",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def process_group_backend(device: torch.device) -> str:
    """Return the backend for tensors on a device: "nccl" for CUDA, "gloo" for the CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: allocated memory on a GPU, resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage is not used, because its peak includes the memory of the parent process at the fork.
    return read_memory_bytes("/proc/self/status", "VmHWM")


def describe_machine(device: torch.device) -> dict[str, object]:
    """Return the device type, the models of GPU and processor, and their numbers."""
    description: dict[str, object] = {"device": device.type, **describe_processor()}
    if device.type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(device)
        description["gpus"] = torch.cuda.device_count()
    return description
