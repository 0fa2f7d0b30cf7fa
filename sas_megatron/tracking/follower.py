"""A process that sends the records of a run while it trains; no tracker can stop or slow the training.

rank 0 starts `sas-megatron runs follow RUN` and keeps a pipe to it
  -> every `SECONDS_BETWEEN` it sends new rows; offline parts of W&B are written at the end only
  -> the pipe closes, also if rank 0 is killed -> it sends the remaining rows and ends
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.io.files import make_folder
from sas_megatron.tracking.rows import RowReader, has_ended
from sas_megatron.tracking.sent_record import FOLDER, locked, read_sent_record
from sas_megatron.tracking.sync import Sender
from sas_megatron.tracking.tracker import REMOTE_TRACKERS, load_tracked_run
from sas_megatron.tracking.wandb_tracker import is_offline

SECONDS_BETWEEN = 10.0
# After an error, twice as long each time.
MAX_SECONDS_BETWEEN = 300.0
# How long the end of training waits for the remaining rows.
SECONDS_AT_END = 10.0
LOG = "log.txt"
# Variables of a launcher and of GPUs, which the process must not use.
_REMOVED_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE")


class Follower:
    """The process that follows a run; an error in starting it is reported and does not end the run.

    Args:
        config: The run, whose directory exists.
    """

    def __init__(self, config: RunConfig) -> None:
        self._run = Path(config.logging.run_directory)
        self._trackers = [name for name in config.logging.trackers if name in REMOTE_TRACKERS]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> list[str]:
        """Start the process if the run has trackers that need one; return lines for the log."""
        if not self._trackers:
            return []
        environment = {key: value for key, value in os.environ.items() if key not in _REMOVED_VARIABLES}
        command = [sys.executable, "-m", "sas_megatron", "runs", "follow", str(self._run)]
        log = self._run / FOLDER / LOG
        try:
            make_folder(log.parent)
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env={**environment, "CUDA_VISIBLE_DEVICES": ""},
                    # Signals of a terminal or a launcher's process group are for the ranks.
                    start_new_session=True,
                )
        except OSError as error:
            return [f"trackers: cannot be started ({error}); {self._describe_sync()}"]
        return [f"trackers: {', '.join(self._trackers)}; their log is {log}"]

    def finish(self) -> list[str]:
        """Close the pipe; at the end of a run, wait a few seconds, and describe the trackers that lack rows.

        A run that is to be resumed has no time to wait, and its next session sends the rest.
        """
        if self._process is None:
            return []
        process, self._process = self._process, None
        assert process.stdin is not None, "it was started with a pipe"
        with contextlib.suppress(OSError):
            process.stdin.close()
        if not has_ended(self._run):
            return []
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_AT_END)
        return [line for name in self._trackers for line in self._describe_missing(name)]

    def _describe_missing(self, tracker: str) -> list[str]:
        try:
            record = read_sent_record(self._run, tracker)
            last_step = 0 if record is None else record.last_step
            missing = RowReader(self._run).read(after=last_step)
        except (UserError, OSError) as error:
            return [f"trackers: {tracker}: {error}"]
        if not missing:
            return []
        return [f"trackers: {tracker} has not received {len(missing)} steps yet; {self._describe_sync()}"]

    def _describe_sync(self) -> str:
        return f"send them later with: sas-megatron runs sync {self._run}"


def follow(directory: Path) -> None:
    """Send the rows of a run until standard input closes, then the remaining rows; print each problem."""
    os.nice(10)
    run = load_tracked_run(directory)
    names = [name for name in run.config.logging.trackers if name in REMOTE_TRACKERS]
    with contextlib.ExitStack() as stack:
        for name in names:
            # The process of the previous session may still be sending.
            stack.enter_context(locked(directory, name, wait=True))
        senders = {name: stack.enter_context(Sender(run, name)) for name in names}
        live = [name for name in names if name != "wandb" or not is_offline()]
        pause, seconds = SECONDS_BETWEEN, 0.0
        while not _is_closed(sys.stdin.fileno(), seconds=seconds):
            pause = SECONDS_BETWEEN if _send(senders, live) else min(2 * pause, MAX_SECONDS_BETWEEN)
            seconds = pause
        _send(senders, names)


def _is_closed(descriptor: int, *, seconds: float) -> bool:
    """Wait until a pipe closes, for at most `seconds`; return whether it has closed."""
    deadline = time.monotonic() + seconds
    while True:
        readable, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            return False
        if not os.read(descriptor, 4096):
            return True


def _send(senders: Mapping[Any, Sender], names: Sequence[str]) -> bool:
    """Send new rows; return whether all trackers were reached."""
    reached = True
    for name in names:
        try:
            result = senders[name].send()
        except Exception as error:  # a tracker must not end the others
            problem: str | None = f"{type(error).__name__}: {error}"
        else:
            problem = result.problem
        if problem is not None:
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {name}: {problem}", flush=True)
            reached = False
    return reached
