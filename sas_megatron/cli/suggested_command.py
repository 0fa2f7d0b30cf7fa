"""The command line that a user can run instead of one that was refused."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence

from sas_megatron.config.errors import FieldError, UserError, WorldSizeError

# The command that started the processes, which launch/ scripts set: the user runs it, and not `sas-megatron`.
COMMAND_VARIABLE = "SAS_MEGATRON_COMMAND"
# Commands whose arguments include overrides of the config that they check.
COMMANDS_WITH_OVERRIDES = (
    "bench",
    "costs",
    "doctor",
    "estimate",
    "evaluate",
    "generate",
    "quickstart",
    "train",
)


def suggest_command(error: UserError) -> str | None:
    """Return the command line of this process with the fix of an error; None if there is none.

    Overrides of the fields that the fix sets are replaced.
    """
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in COMMANDS_WITH_OVERRIDES:
        return None
    started = shlex.split(os.environ.get(COMMAND_VARIABLE, ""))
    if not started and "LOCAL_RANK" in os.environ:  # by a launcher whose command is unknown
        return None
    if isinstance(error, WorldSizeError):
        return None if arguments[0] != "train" else _with_processes(started, error.num_processes)
    if not isinstance(error, FieldError) or not error.fix:
        return None
    fields = {override.partition("=")[0] for override in error.fix}
    words = started or ["sas-megatron", *arguments]
    kept = [word for word in words if word.partition("=")[0] not in fields]
    return shlex.join([*kept, *error.fix])


def _with_processes(started: Sequence[str], num_processes: int) -> str | None:
    """Return the command with another number of processes on this node; None on several nodes."""
    if os.environ.get("NNODES", "1") != "1":
        return None
    if started:
        script, *arguments = started
        if arguments and re.fullmatch(r"\d+", arguments[0]):
            arguments = arguments[1:]
        return shlex.join([script, str(num_processes), *arguments])
    torchrun = ("torchrun", "--standalone", "--nproc-per-node", str(num_processes), "-m", "sas_megatron")
    return shlex.join([*torchrun, *sys.argv[1:]])
