"""One process that believes itself to be one rank of many, on tensors that have shapes and no storage.

    torch.distributed's "fake" back end: groups of any size, collectives that return at once
      -> Megatron-core's groups of the layout, by the project's own `joined_groups`
      -> torch's FakeTensorMode: every operation computes shapes alone
      -> what the code reads out of a tensor (`.item()`) is answered with a one

So the real engine and the real training step run unchanged, and what they allocate, compute and
send is what is counted.
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


class _NothingHappens(TorchDispatchMode):
    """Answers what needs values: collectives are done at once, and `.item()` gives one.

    One is finite, so that the checks of loss and gradient norm pass.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            # Outputs come first among the arguments, in place, and among the results, before the work.
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func is torch.ops.aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


class _TensorsOfMadeUpScalars(TorchFunctionMode):
    """Makes a tensor of lists of scalar tensors, which torch would read below every dispatch mode."""

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
    """This process as rank `rank` of `world_size`, its new tensors without storage, for a `with` block.

    The process must not be part of a process group, and `prepare_device` must have found the CPU:
    the tensors say they are the CPU's, whatever hardware is asked about.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with (
            _replaced(_stand_ins()),
            joined_groups(config, device=torch.device("cpu"), seed=1) as topology,
            FakeTensorMode(allow_non_fake_inputs=True),
            _NothingHappens(),
            _TensorsOfMadeUpScalars(),
        ):
            yield topology
    finally:
        dist.destroy_process_group()


def _stand_ins() -> list[tuple[Any, str, Callable[..., Any]]]:
    """What must be answered without tensors: (module, name, answer)."""
    new_group, get_rng_state = dist.new_group, torch.get_rng_state

    def new_fake_group(ranks: list[int], **options: Any) -> Any:
        # Megatron-core makes gloo groups beside the others; gloo would look for its peers.
        return new_group(ranks, **{**options, "backend": "fake"})

    def gather_own_object(gathered: list[Any], own: Any, group: Any = None) -> None:
        # All ranks would say the same, or the answer is used for messages alone.
        gathered[:] = [own] * len(gathered)

    def real_random_state(*_args: Any) -> torch.Tensor:
        with _disable_current_modes():
            return get_rng_state()

    return [
        (dist, "new_group", new_fake_group),
        (dist, "all_gather_object", gather_own_object),
        (torch.nn.Module, "bfloat16", _already_bfloat16),
        (torch, "get_rng_state", real_random_state),
        # No operation draws a number here.
        (torch, "set_rng_state", lambda *_args: None),
    ]


def _already_bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    """The module, whose parameters must be in bfloat16; torch cannot convert parameters without storage."""
    for name, parameter in module.named_parameters():
        if parameter.dtype != torch.bfloat16:
            raise NotImplementedError(f"{name} is built in {parameter.dtype}, to be converted to bfloat16")
    return module


@contextlib.contextmanager
def _replaced(stand_ins: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    kept = [(module, name, getattr(module, name)) for module, name, _ in stand_ins]
    for module, name, stand_in in stand_ins:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for module, name, original in kept:
            setattr(module, name, original)
