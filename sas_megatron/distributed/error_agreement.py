"""Problems that the user can mend, met by all ranks alike whichever rank has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from sas_megatron.config.errors import UserError
from sas_megatron.distributed.gathering import gather_from_ranks

T = TypeVar("T")


def together(action: Callable[[], T]) -> T:
    """What `action` returns on this rank, if it succeeds on every rank; every rank must call it.

    Raises:
        UserError: the lowest rank's, the same on every rank.
    """
    result, problem = None, None
    try:
        result = action()
    except UserError as error:
        problem = error
    for found in gather_from_ranks(problem):
        if found is not None:
            raise _met_by_all(found)
    return result  # type: ignore[return-value]  # an action that returned nothing returns None


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, on every rank; others do not run it.

    Raises:
        UserError: rank 0's.
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
        raise _met_by_all(result)
    return result  # type: ignore[return-value]


def _met_by_all(error: UserError) -> UserError:
    """So that one rank speaks for them all."""
    error.raised_on_all_ranks = True
    return error
