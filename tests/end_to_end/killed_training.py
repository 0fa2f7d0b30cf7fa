"""Trains as `sas-megatron train CONFIG` does, except that one rank kills itself with SIGKILL.

usage: python -m tests.end_to_end.killed_training RECORD RANK PHASE NUMBER SECONDS CONFIG

RANK dies SECONDS after its NUMBER-th PHASE (step, save or load) began, or as that ends if it is shorter.
Before, it appends to the file RECORD what it was doing.
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
    """Follows the phases of training and kills this process in the given one."""

    def __init__(self, record: str, *, phase: str, number: int, seconds: float) -> None:
        self._record, self._phase, self._left, self._seconds = record, phase, number, seconds
        self._dies_once, self._open_phases = threading.Lock(), list[str]()

    def mark(self, owner: Any, name: str, *, enters: str | None = None, leaves: str | None = None) -> None:
        """Let a function of `owner` begin or end a phase."""
        marked = getattr(owner, name)

        def run_marked(*args: Any, **kwargs: Any) -> Any:
            if enters:
                self._enter(enters)
            result = marked(*args, **kwargs)
            if leaves:
                self._leave(leaves)
            return result

        setattr(owner, name, run_marked)

    def _enter(self, phase: str) -> None:
        self._open_phases.append(phase)
        self._left -= phase == self._phase
        if self._left == 0 and phase == self._phase:
            threading.Thread(target=self._die_later, daemon=True).start()

    def _leave(self, phase: str) -> None:
        if self._left == 0 and phase == self._phase:
            self._die(at_end=True)
        self._open_phases.remove(phase)

    def _die_later(self) -> None:
        time.sleep(self._seconds)
        self._die(at_end=False)

    def _die(self, *, at_end: bool) -> None:
        self._dies_once.acquire()
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        with open(self._record, "a") as file:
            print(json.dumps({"phases": self._open_phases, "at_end": at_end, "place": place}), file=file)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    record, rank, phase, number, seconds, config = sys.argv[1:]
    prepare_device()
    from sas_megatron.training import entry, loop, starting_point

    if os.environ["RANK"] == rank:
        killer = Killer(record, phase=phase, number=int(number), seconds=float(seconds))
        killer.mark(loop, "train_step", enters="step", leaves="step")
        # Of an asynchronous save also what happens beside the training.
        killer.mark(loop.CheckpointSaver, "_begin", enters="save")
        killer.mark(loop.CheckpointSaver, "_publish", leaves="save")
        killer.mark(starting_point, "find_newest_complete", enters="load")
        killer.mark(loop.Run, "_restore", leaves="load")
    entry.train(load_run_config(config))
