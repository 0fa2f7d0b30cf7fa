"""Run one process as one rank of many, on tensors that have a shape but no storage.

    torch.distributed's "fake" backend: groups of any size, collectives that return immediately
      -> Megatron-core's process groups of the layout, created by `joined_groups`
      -> torch's FakeTensorMode: every operation computes only the shape of its result
      -> reading a value out of a tensor (`.item()`) returns one

The training engine and the training step run unchanged, so that their allocations, operations and
collectives can be counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.distributed.topology import Topology, joined_groups
from sas_megatron.model import assembly


class _FakeResults(TorchDispatchMode):
    """Complete collectives immediately, and return one from `.item()`.

    One is finite, so the checks of the loss and of the gradient norm pass.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            # The output tensors are the first argument, which is modified in place. An operation that also
            # returns them puts them before its work handle.
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class _TensorFromScalars(TorchFunctionMode):
    """Convert scalar tensors to numbers in `torch.tensor([...])`, which no dispatch mode would see."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.tensor and isinstance(args[0], list | tuple):
            args = (tree_map_only(torch.Tensor, torch.Tensor.item, args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_world(config: ParallelConfig, *, rank: int, world_size: int) -> Iterator[Topology]:
    """Run a `with` block as rank `rank` of `world_size`, whose new tensors have no storage.

    The process must not have joined a process group. `prepare_device` must have chosen the CPU, since
    the tensors report the CPU as their device, whichever hardware the estimate is for.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            _replace_attributes(_replacements()),
            joined_groups(config, device=torch.device("cpu"), seed=1) as topology,
            FakeTensorMode(allow_non_fake_inputs=True),
            _FakeResults(),
            _TensorFromScalars(),
        ):
            yield topology
    finally:
        dist.destroy_process_group()


def _replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
    """Return the functions that need real tensors or peers: (module, attribute name, replacement)."""
    new_group, get_rng_state = dist.new_group, torch.get_rng_state

    def new_fake_group(ranks: list[int], **options: Any) -> Any:
        # Megatron-core also creates gloo groups, and gloo would wait for its peers.
        return new_group(ranks, **{**options, "backend": "fake"})

    def gather_local_object(gathered: list[Any], local: Any, group: Any = None) -> None:
        # All ranks would contribute an equal object, or only messages depend on the result.
        gathered[:] = [local] * len(gathered)

    def real_random_state(*_args: Any) -> torch.Tensor:
        with _disable_current_modes():
            return get_rng_state()

    return [
        (dist, "new_group", new_fake_group),
        (dist, "all_gather_object", gather_local_object),
        (torch.nn.Module, "bfloat16", _check_bfloat16),
        (torch, "get_rng_state", real_random_state),
        # No operation draws random numbers on fake tensors, and NumPy would draw them for nothing.
        (assembly, "initialize_weights", lambda *_args: None),
        (torch, "set_rng_state", lambda *_args: None),
    ]


def _check_bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module unchanged if all its parameters are in bfloat16.

    Raises:
        NotImplementedError: A parameter has another dtype; torch cannot convert it without its storage.
    """
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.bfloat16:
            raise NotImplementedError(
                f"parameter {name}: dtype {parameter.dtype} cannot be converted without storage; "
                "build the model in bfloat16"
            )
    return module


@contextlib.contextmanager
def _replace_attributes(replacements: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    for module, name, replacement in replacements:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
