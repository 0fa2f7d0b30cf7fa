"""Train like `sas-megatron train CONFIG`, except that one rank kills itself with SIGKILL.

usage: python -m tests.end_to_end.killed_training RECORD RANK PHASE NUMBER SECONDS CONFIG

RANK dies SECONDS after the start of its NUMBER-th PHASE (step, save or load), or at the end of a shorter
phase. Before that, it appends its open phases and its position in the code to the file RECORD.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

from sas_megatron.config.loading import load_run_config
from sas_megatron.platform.device import prepare_device


class Killer:
    """Tracks the phases of training and kills this process in one of them."""

    def __init__(self, record: str, *, phase: str, number: int, seconds: float) -> None:
        self._record, self._phase, self._remaining, self._seconds = record, phase, number, seconds
        self._kill_lock, self._open_phases = threading.Lock(), list[str]()

    def mark(self, owner: Any, name: str, *, starts: str | None = None, ends: str | None = None) -> None:
        """Let a function of `owner` start a phase when it is called, or end one when it returns."""
        marked = getattr(owner, name)

        def run_marked(*args: Any, **kwargs: Any) -> Any:
            if starts:
                self._start(starts)
            result = marked(*args, **kwargs)
            if ends:
                self._end(ends)
            return result

        setattr(owner, name, run_marked)

    def _start(self, phase: str) -> None:
        self._open_phases.append(phase)
        self._remaining -= phase == self._phase
        if self._remaining == 0 and phase == self._phase:
            threading.Thread(target=self._die_later, daemon=True).start()

    def _end(self, phase: str) -> None:
        if self._remaining == 0 and phase == self._phase:
            self._die(at_end=True)
        self._open_phases.remove(phase)

    def _die_later(self) -> None:
        time.sleep(self._seconds)
        self._die(at_end=False)

    def _die(self, *, at_end: bool) -> None:
        self._kill_lock.acquire()
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        location = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        with open(self._record, "a") as file:
            print(
                json.dumps({"phases": self._open_phases, "at_end": at_end, "location": location}), file=file
            )
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    record, rank, phase, number, seconds, config = sys.argv[1:]
    prepare_device()
    from sas_megatron.training import entry, loop, starting_point

    if os.environ["RANK"] == rank:
        killer = Killer(record, phase=phase, number=int(number), seconds=float(seconds))
        killer.mark(loop, "train_step", starts="step", ends="step")
        # The phase includes the part of an asynchronous save that runs concurrently with training.
        killer.mark(loop.CheckpointSaver, "_begin", starts="save")
        killer.mark(loop.CheckpointSaver, "_publish", ends="save")
        killer.mark(starting_point, "find_newest_complete", starts="load")
        killer.mark(loop.Run, "_restore", ends="load")
    entry.train(load_run_config(config))
