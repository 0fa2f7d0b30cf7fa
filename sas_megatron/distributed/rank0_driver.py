"""One rank decides what is computed, where only it knows what comes next, and all ranks compute it.

rank 0    action(call) -> call("score", …) -> broadcast -> score(…) … -> action's result
others    wait for a call -> score(…), the same -> wait … -> until rank 0 has done
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from sas_megatron.config.errors import UserError

T = TypeVar("T")
Call = Callable[..., Any]


@dataclass(frozen=True)
class _Order:
    """A function to call; no name and no error: rank 0 has done."""

    name: str | None = None
    arguments: tuple[Any, ...] = ()
    error: UserError | None = None


def lead(action: Callable[[Call], T], functions: Mapping[str, Callable[..., Any]]) -> T | None:
    """What `action` returns on rank 0; None on the others. Every rank must call it.

    Args:
        action: Runs on rank 0 and is given `call(name, *arguments)`, which calls one of `functions` on every
            rank at once, with arguments that can be pickled, and returns what it returns on rank 0.
        functions: By name, the same on every rank; they may use collectives.

    Raises:
        UserError: on every rank, one that `action` or a function raises on rank 0.
    """

    def call(name: str, *arguments: Any) -> Any:
        _broadcast(_Order(name, arguments))
        return functions[name](*arguments)

    if dist.get_rank() == 0:
        try:
            result = action(call)
        except UserError as error:
            _broadcast(_Order(error=error))
            raise
        _broadcast(_Order())
        return result
    while (order := _broadcast(None)).name is not None:
        # What all meet alike in a function, rank 0 lets all know.
        with contextlib.suppress(UserError):
            functions[order.name](*order.arguments)
    if order.error is not None:
        raise order.error
    return None


def _broadcast(order: _Order | None) -> _Order:
    """Rank 0's order, on every rank."""
    received = [order]
    dist.broadcast_object_list(received, src=0)
    (found,) = received
    assert found is not None, "rank 0 gives the orders"
    return found
