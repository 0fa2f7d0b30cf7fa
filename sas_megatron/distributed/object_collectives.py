"""Collectives on Python objects: gather values, raise errors on all ranks, drive ranks from rank 0.

Each function must be called by all ranks of the world; the objects that it sends must be picklable.

`drive_from_rank0` is for code that only rank 0 can run, such as a library that selects the next batch to
score:

    rank 0        action(call) -> call("score", ...) -> broadcast -> score(...) ... -> the action's result
    other ranks   wait for a call -> score(...) -> wait for the next call ... -> until rank 0 has finished
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from sas_megatron.config.errors import UserError

T = TypeVar("T")
# Seconds between two looks into the store, which answers the ranks of all nodes.
LONGEST_PAUSE = 1.0
_long_action_numbers = itertools.count()
Call = Callable[..., Any]


def gather_from_ranks(value: T) -> list[T]:
    """Return the values of all ranks of the world, in rank order, on every rank."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return its result on this rank.

    Raises:
        UserError: `action` raised one on some rank. All ranks raise the error of the lowest such rank.
    """
    result, error = None, None
    try:
        result = action()
    except UserError as raised:
        error = raised
    for rank_error in gather_from_ranks(error):
        if rank_error is not None:
            raise _mark_as_raised_on_all_ranks(rank_error)
    return result  # type: ignore[return-value]  # None only if the action returned None


def run_on_rank0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only and return its result on every rank.

    Raises:
        UserError: `action` raised one on rank 0. All ranks raise it.
    """
    outcome: list[T | UserError | None] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [action()]
        except UserError as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    (result,) = outcome
    if isinstance(result, UserError):
        raise _mark_as_raised_on_all_ranks(result)
    return result  # type: ignore[return-value]


def run_long_on_rank0(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only, for longer than collectives may take, and return its result on every rank.

    The other ranks look into the rendezvous store until rank 0 has finished: a collective would end with an
    error after `training.collective_timeout_minutes`. If rank 0 dies, the failure watchdog ends them.

    Raises:
        UserError: `action` raised one on rank 0. All ranks raise it.
    """
    if dist.get_world_size() == 1:
        return run_on_rank0(action)
    store, key = dist.distributed_c10d._get_default_store(), f"long_action/{next(_long_action_numbers)}"

    def run_and_announce() -> T:
        try:
            return action()
        finally:
            store.set(key, "")

    if dist.get_rank() != 0:
        pause = 0.01
        while not store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
    return run_on_rank0(run_and_announce)


@dataclass(frozen=True)
class _Command:
    """A message from rank 0: the function to call, or, without a name, the end of the action."""

    name: str | None = None
    arguments: tuple[Any, ...] = ()
    error: UserError | None = None


def drive_from_rank0(action: Callable[[Call], T], functions: Mapping[str, Callable[..., Any]]) -> T | None:
    """Run `action` on rank 0, which can call functions on all ranks; return its result on rank 0, else None.

    Args:
        action: Runs on rank 0. It receives `call(name, *arguments)`, which calls one of `functions` on every
            rank at the same time and returns the result of rank 0.
        functions: The functions by name, the same on every rank. They may use collectives.

    Raises:
        UserError: `action` or a function raised one on rank 0. All ranks raise it.
    """

    def call(name: str, *arguments: Any) -> Any:
        _broadcast_command(_Command(name, arguments))
        return functions[name](*arguments)

    if dist.get_rank() == 0:
        try:
            result = action(call)
        except UserError as error:
            _broadcast_command(_Command(error=error))
            raise
        _broadcast_command(_Command())
        return result
    while (command := _broadcast_command(None)).name is not None:
        # If the function raises the same error on all ranks, rank 0 sends it with its last command.
        with contextlib.suppress(UserError):
            functions[command.name](*command.arguments)
    if command.error is not None:
        raise command.error
    return None


def _broadcast_command(command: _Command | None) -> _Command:
    """Return the command of rank 0 on every rank; the other ranks pass None."""
    received = [command]
    dist.broadcast_object_list(received, src=0)
    (found,) = received
    assert found is not None, "rank 0 broadcasts a command, never None"
    return found


def _mark_as_raised_on_all_ranks(error: UserError) -> UserError:
    """Mark the error so that only one rank prints it."""
    error.raised_on_all_ranks = True
    return error
