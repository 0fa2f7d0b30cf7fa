"""Problems that the user can mend, met by all ranks alike whichever rank has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from sas_megatron.config.errors import FileProblem, UserError
from sas_megatron.parallel.gathering import gather_from_ranks

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
            raise found
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
        raise result
    return result  # type: ignore[return-value]


def writing(folder: Path, action: Callable[[], T]) -> Callable[[], T]:
    """`action`, with a failure to write turned into a `FileProblem`."""

    def attempt() -> T:
        try:
            return action()
        # torch wraps what the file system says in a RuntimeError.
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise FileProblem(
                folder,
                f"cannot be written ({reason})",
                "make room or mend the file system; the checkpoints before are whole, so go on from the "
                "last with checkpoint.resume=true",
            ) from error

    return attempt
