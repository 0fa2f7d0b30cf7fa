"""Count the FLOPs and the memory traffic of every operation that torch dispatches in this process."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from sas_megatron.planning.workload import Kind, Operation

aten = torch.ops.aten

# FLOPs of a call by operation: torch's formulas, and the formulas that its registry lacks.
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.baddbmm_: flop_registry[aten.baddbmm],
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}

# Operations that move no tensor data: they allocate, read out one number, or return a view.
_NO_DATA = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._local_scalar_dense,
    aten._unsafe_view,
}

# Operations that read only those elements of their first operand that appear in the result.
_INDEXED_READS = {aten.index, aten.index_select, aten.embedding, aten.gather}
# Operations that write only those elements of their first operand that the other operands supply.
_INDEXED_WRITES = {aten.index_put_}


class OperationMeter(TorchDispatchMode):
    """Count the calls of each `Operation` while the context is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Operation] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_counted(func):
            self._count(func, args, kwargs or {}, result)
        return result

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        outputs = [value for value in tree_iter(result) if isinstance(value, torch.Tensor)]
        outputs = outputs or _written(func, args, kwargs)
        tensors = outputs or inputs
        if not tensors:
            return
        flops = _count_flops(func, args, kwargs, result)
        kind = _kind_of(func)
        causal = kind == "attention" and _argument(func, args, kwargs, "is_causal") is True
        self.calls[
            Operation(
                name=str(func.overloadpacket).removeprefix("aten."),
                kind=kind,
                dtype=str(tensors[0].dtype).removeprefix("torch."),
                flops=flops,
                executed_flops=flops // 2 if causal else flops,
                traffic_bytes=_traffic_bytes(func, inputs, outputs),
            )
        ] += 1


@functools.cache
def _is_counted(func: Any) -> bool:
    """Return whether a call computes or moves data; views, shape queries and collectives do not."""
    if func.namespace in ("c10d", "prim") or func.overloadpacket in _NO_DATA:
        return False
    schema = func._schema
    views = any(result.alias_info is not None for result in schema.returns) and not schema.is_mutable
    return not views


@functools.cache
def _kind_of(func: Any) -> Kind:
    name = str(func.overloadpacket)
    if "attention" in name:
        return "attention"
    if "convolution" in name:
        return "convolution"
    return "matrix" if func.overloadpacket in FLOP_FORMULAS else "elementwise"


def _count_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    formula = FLOP_FORMULAS.get(func.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[index] if index < len(args) else kwargs.get(name, argument.default_value)
    return None


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the arguments that an operation changes in place; those on lists of tensors return nothing."""
    arguments = [argument.name for argument in func._schema.arguments if argument.is_write]
    written = [name for name in arguments if name != "grads"]  # changed only if AdamW unscales gradients
    values = [_argument(func, args, kwargs, name) for name in written]
    return [value for value in tree_iter(values) if isinstance(value, torch.Tensor)]


def _traffic_bytes(func: Any, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    if func.overloadpacket in _INDEXED_READS:
        return sum(2 * _touched_bytes(tensor) for tensor in outputs)
    if func.overloadpacket in _INDEXED_WRITES:
        return sum(2 * _touched_bytes(tensor) for tensor in inputs[1:])
    return sum(_touched_bytes(tensor) for tensor in (*inputs, *outputs))


def _touched_bytes(tensor: torch.Tensor) -> int:
    # An expanded tensor reports more elements than its storage has.
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
