"""A stand-in for the CUDA calls that Megatron-core makes unasked, so that it trains on CPU with gloo.

Megatron-core asks `torch.cuda` for the current device, streams, events, profiler ranges and random
states, and writes `device="cuda"` and `'torch.cuda.FloatTensor'` in its code. `install()` answers
those questions for the CPU. It does nothing where there is an accelerator.
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
    """A CUDA stream or event on a device whose work is done when the call returns."""

    def __init__(self, *_args: object, **_options: object) -> None: ...

    def _nothing(self, *_args: object, **_options: object) -> None:
        return None

    synchronize = wait_stream = wait_event = record = wait = _nothing

    def record_event(self, event: _CpuStream | None = None) -> _CpuStream:
        return event or _CpuStream()

    def query(self) -> bool:
        return True


class _CudaMeansCpu(TorchFunctionMode):
    """Reads a CUDA device in a torch call as the CPU, and names CPU tensor types as CUDA ones."""

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
            # Megatron-core sorts parameters by 'torch.cuda.FloatTensor' and its like.
            return str(func(*args)).replace("torch.", "torch.cuda.", 1)
        if kwargs and "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs and kwargs.get("pin_memory"):
            # Pinning is for copies to a GPU, and fails without one.
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **(kwargs or {}))


def _is_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _stand_ins() -> dict[str, Any]:
    """Names in `torch.cuda` and what answers for them on CPU.

    Each is an object of its own: torch's compiler keeps a table of these functions and refuses one
    that stands under two names.
    """
    return {
        # A torch.device, because factory calls take what current_device() returns as their device.
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
    """Imports Megatron-core with its small fused functions left plain.

    Compiling them needs a C++ compiler at run time and gains nothing measurable on CPU; leaving
    torch's compiler out of the import also saves its seconds.
    """
    compile_function = torch.compile
    torch.compile = lambda function, **_options: function  # type: ignore[assignment]
    try:
        from megatron.core import jit
    finally:
        torch.compile = compile_function
    jit.disable_jit_fuser()


def install() -> bool:
    """Installs the stand-in where there is no accelerator; call before importing megatron.core.

    Returns:
        Whether it is installed now: False on a machine with CUDA, which is left untouched.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    _import_megatron_uncompiled()
    for name, stand_in in _stand_ins().items():
        setattr(torch.cuda, name, stand_in)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_args: None)
    _CudaMeansCpu().__enter__()

    from megatron.core.tensor_parallel import random as megatron_random

    # On CPU the two random states that its tracker compares are one, so it would warn at each use.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    megatron_random._get_cuda_rng_state = lambda *_args, **_options: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_args, **_options: torch.set_rng_state(state)
    _installed = True
    return True
