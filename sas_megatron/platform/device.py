"""The device this process computes on, and the process-group back end that goes with it."""

from __future__ import annotations

import os
import warnings

import torch

from sas_megatron.config.errors import FieldError
from sas_megatron.platform import cpu
from sas_megatron.platform.machine import describe_processor, read_memory_bytes
from sas_megatron.platform.rotary import offer_fused_rotary


def prepare_device() -> torch.device:
    """Chooses this process's device, and readies Megatron-core for it.

    Returns:
        The CUDA device numbered LOCAL_RANK, or the CPU (with the stand-in installed) where torch
        finds no CUDA device.
    """
    # Megatron-core warns, on every rank, of each optional package that is absent, and calls collectives
    # by names that newer torch calls deprecated; a user can mend neither.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed.*` is deprecated")
    on_cpu = cpu.install()
    offer_fused_rotary()
    if on_cpu:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise FieldError(
            "LOCAL_RANK",
            local_rank,
            f"is beyond the {torch.cuda.device_count()} GPUs of this node",
            "start one process a GPU, or set CUDA_VISIBLE_DEVICES= to compute on the CPU",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def process_group_backend(device: torch.device) -> str:
    """NCCL for CUDA tensors, gloo for those of the CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held at once so far: allocated on a GPU, resident for a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: its figure starts at what the parent held when it started this process.
    return read_memory_bytes("/proc/self/status", "VmHWM")


def describe_machine(device: torch.device) -> dict[str, object]:
    """Device type, GPU and processor, and how many of each."""
    description: dict[str, object] = {"device": device.type, **describe_processor()}
    if device.type == "cuda":
        description["gpu"] = torch.cuda.get_device_name(device)
        description["gpus"] = torch.cuda.device_count()
    return description
