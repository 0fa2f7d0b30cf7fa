"""CPU replacements for the CUDA calls of Megatron-core, so that it trains on CPU with gloo.

Megatron-core calls `torch.cuda` for the current device, streams, events, profiler ranges and random states,
and its code contains `device="cuda"` and `'torch.cuda.FloatTensor'`. `install()` replaces those calls with
CPU equivalents. It changes nothing on a machine with CUDA.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_installed = False


class _CpuStream:
    """A replacement for CUDA streams and events on the CPU, where work has finished when the call returns."""

    def __init__(self, *_args: object, **_options: object) -> None: ...

    def _do_nothing(self, *_args: object, **_options: object) -> None:
        return None

    synchronize = wait_stream = wait_event = record = wait = _do_nothing

    def record_event(self, event: _CpuStream | None = None) -> _CpuStream:
        return event or _CpuStream()

    def query(self) -> bool:
        return True


class _CudaToCpu(TorchFunctionMode):
    """Replaces CUDA devices in torch calls with the CPU, and reports CPU tensor types as CUDA types."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron-core groups parameters by type names such as 'torch.cuda.FloatTensor'.
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs and kwargs.get("pin_memory"):
            # Pinned memory is for copies to a GPU, and requesting it fails without one.
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **(kwargs or {}))


def _is_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _replacements() -> dict[str, Any]:
    """Return the replacements for attributes of `torch.cuda`, by name.

    Each is a separate object: torch's compiler keeps a table of these functions and rejects one with two
    names.
    """
    return {
        # A torch.device rather than an index, because factory functions take the result as their `device`.
        "current_device": lambda: torch.device("cpu"),
        "set_device": lambda _device: None,
        "synchronize": lambda _device=None: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda _device=None: None,
        "device": contextlib.nullcontext,
        "stream": lambda _stream: contextlib.nullcontext(),
        "Stream": _CpuStream,
        "Event": type("Event", (_CpuStream,), {}),
        "current_stream": lambda _device=None: _CpuStream(),
        "default_stream": lambda _device=None: _CpuStream(),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *_args, **_options: torch.get_rng_state(),
        "set_rng_state": lambda new_state, *_args, **_options: torch.set_rng_state(new_state),
    }


def _import_megatron_uncompiled() -> None:
    """Import Megatron-core without compiling its small fused functions.

    Compilation needs a C++ compiler at run time and gains nothing measurable on CPU. Not importing torch's
    compiler also saves seconds.
    """
    compile_function = torch.compile
    torch.compile = lambda function, **_options: function  # type: ignore[assignment]
    try:
        from megatron.core import jit
    finally:
        torch.compile = compile_function
    jit.disable_jit_fuser()


def install() -> bool:
    """Install the replacements unless CUDA is available; call it before importing megatron.core.

    Returns:
        Whether the replacements are installed; False on a machine with CUDA, where nothing is changed.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    _import_megatron_uncompiled()
    for name, replacement in _replacements().items():
        setattr(torch.cuda, name, replacement)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_args: None)
    _CudaToCpu().__enter__()

    from megatron.core.tensor_parallel import random as megatron_random

    # Its tracker compares the random states of CPU and GPU. Here they are the same, so it would warn at each
    # use.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    megatron_random._get_cuda_rng_state = lambda *_args, **_options: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_args, **_options: torch.set_rng_state(state)
    _installed = True
    return True
