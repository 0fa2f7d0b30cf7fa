"""The process that runs the inputs of one target.

It limits its own memory. A crash ends it, and `watched_child` ends it after a hang.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import resource
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from sas_megatron.config.errors import UserError
from tests.fuzzing.inputs import Files, Input, apply_changes, write_files

MAX_MEMORY_BYTES = 2 << 30
# After an input that leaves this much memory, such as a cache, the next one gets a new child.
MAX_LEFT_BYTES = 1 << 29
# A message that lists several faults of a config has a line for each.
MAX_MESSAGE_CHARACTERS = 20_000
MESSAGE = "sas-megatron: error: "

State = Literal["accepted", "refused", "failed"]
Seeds = dict[str, Files]


@dataclass(frozen=True)
class Result:
    """What became of an input; `text` is the message of a refusal, or describes the failure."""

    state: State
    text: str = ""


@dataclass(frozen=True)
class Target:
    """What reads the files of an input.

    Attributes:
        build: Returns valid files by the name of their seed; runs in a child.
        run: Uses the files in the working folder, with the arguments of the input, as users do. It raises the
            product's user errors, or ends as the command line does.
        arguments: The arguments with which undamaged files are accepted.
    """

    build: Callable[[], Seeds]
    run: Callable[[tuple[str, ...]], None]
    arguments: tuple[str, ...] = ()


def serve(connection: Connection, target: Target, seeds: Seeds | None, folder: str) -> None:
    """Send the seeds, try them undamaged, then receive inputs and send their results.

    Args:
        connection: The end of a pipe.
        target: What to run.
        seeds: The files of the seeds; None to build them.
        folder: The folder of the child, which holds a folder for each seed and the file `log`.
    """
    os.setsid()
    log = open(Path(folder, "log"), "w")  # noqa: SIM115  # as long as the process
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    faulthandler.enable(log)
    seeds = target.build() if seeds is None else seeds
    for name, files in seeds.items():
        write_files(Path(folder, name), files)
    connection.send(seeds)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # This also imports what the target needs, so that the limit below applies to inputs alone.
    connection.send(
        {
            name: run_input(target, Input(name, arguments=target.arguments), files, Path(folder, name))
            for name, files in seeds.items()
        }
    )
    memory_at_start = _memory_bytes()
    limit = memory_at_start + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        tried: Input = connection.recv()
        connection.send(run_input(target, tried, seeds[tried.seed], Path(folder, tried.seed)))
        connection.send(_memory_bytes() - memory_at_start > MAX_LEFT_BYTES)


def run_input(target: Target, tried: Input, files: Files, folder: Path) -> Result:
    """Change the files of a seed, run the target in their folder, and restore the files."""
    os.chdir(folder)
    apply_changes(folder, tried.changes)
    output, errors = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=kind)
        for kind in ("strict", "backslashreplace")
    )
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            target.run(tried.arguments)
            output.flush()
    except UserError as error:
        return _check_message(str(error))
    except SystemExit as ending:
        return _check_ending(ending, errors)
    except BaseException as error:
        return Result("failed", f"{type(error).__name__}\n{traceback.format_exc()[-4_000:]}")
    finally:
        apply_changes(folder, {path: files.get(path) for path in tried.changes})
    return Result("accepted")


def _check_ending(ending: SystemExit, errors: io.TextIOWrapper) -> Result:
    """Return the result of a command that ended with an exit status."""
    if ending.code in (0, None):
        return Result("accepted")
    errors.flush()
    text = errors.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if ending.code != 2:
        return Result("failed", f"exit status {ending.code}\n{text}")
    before, found, message = text.partition(MESSAGE)
    if not found and "Usage: " in text:  # a message of click
        return _check_message(text)
    if not found or MESSAGE in message or "Error" in before:
        return Result("failed", f"not one message\n{text}")
    return _check_message(message)


def _check_message(message: str) -> Result:
    """Return a refusal, if its message is one that a user can read."""
    if not message.strip() or "Traceback" in message or len(message) > MAX_MESSAGE_CHARACTERS:
        return Result("failed", f"not a readable message ({len(message):,} characters)\n{message[:2_000]}")
    return Result("refused", message)


def _memory_bytes() -> int:
    """Return the size of this process's address space, which the limit counts."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def run_command(*arguments: str) -> None:
    """Run `sas-megatron ARGUMENT ...` in this process; ends with SystemExit."""
    from sas_megatron.cli.main import main

    sys.argv = ["sas-megatron", *arguments]
    main()


def run_successfully(*arguments: str) -> None:
    """Run a command in this process; return if its exit status is 0."""
    try:
        run_command(*arguments)
    except SystemExit as ending:
        if ending.code not in (0, None):
            raise
