"""Stopping in good order: on a signal or after a time, at the end of a step, on all ranks.

a signal, or the time is up -> `is_asked` on this rank -> the step's sum tells all ranks -> save, leave

A second signal ends the process at once, as the first would have done without this.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import dataclass
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# EX_TEMPFAIL of sysexits.h: what failed now may be tried again.
STOPPED_STATUS = 75
# Of one order, torchrun and the scheduler may each hand a process a signal of its own.
SAME_ORDER_SECONDS = 2.0

STOP_AFTER_SECONDS = "stop_after_seconds"


@dataclass(frozen=True)
class Ending:
    """Why a run ended in good order, and whether it is to be gone on with."""

    reason: str
    goes_on: bool = False

    @property
    def exit_status(self) -> int:
        """Of the process: 0, or `STOPPED_STATUS` where the run is to be gone on with."""
        return STOPPED_STATUS if self.goes_on else 0


class StopRequest:
    """For the length of a `with` block, what asks this rank to stop.

    Until `arm` is called, and from the second order on, a signal does what it did before. Where a
    roll call watches, it takes the signals and asks `take`. The main thread must enter it.
    """

    def __init__(self, *, after_seconds: float | None) -> None:
        self._deadline = None if after_seconds is None else time.monotonic() + after_seconds
        self._lock = threading.RLock()  # a signal may come while the handler runs for another
        self._armed = False
        self._over = False
        self._signal: signal.Signals | None = None
        self._taken_at = 0.0
        self._speaks = False

    def __enter__(self) -> StopRequest:
        self._old_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old_handlers.items():
            # As soon as one process has ended with another status than 0, torchrun ends the others.
            signal.signal(number, signal.SIG_IGN if self._over else handler)

    def arm(self, *, speaks: bool) -> None:
        """From now on there is something to save: the first order waits for the step's end.

        It is acknowledged where `speaks`.
        """
        self._speaks, self._armed = speaks, True

    def leave(self) -> None:
        """All is saved and the process is about to end: no signal is needed any more."""
        self._over = True

    def take(self, number: int) -> bool:
        """Whether a signal is taken care of; any thread may ask, once or more for each signal."""
        with self._lock:
            if self._over:
                return True
            if not self._armed:
                return False
            if self._signal is not None:
                return time.monotonic() - self._taken_at < SAME_ORDER_SECONDS
            self._signal, self._taken_at = signal.Signals(number), time.monotonic()
        if self._speaks:
            text = f"received {self._signal.name}: saving after this step; another signal ends at once"
            os.write(2, f"{text}\n".encode())  # print may have been interrupted by this very signal
        return True

    @property
    def reason(self) -> str | None:
        """What asks this rank to stop, as `exit_reason` has it; None: nothing does."""
        if self._signal is not None:
            return f"signal {self._signal.name}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return STOP_AFTER_SECONDS
        return None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.take(number):
            signal.signal(number, self._old_handlers[signal.Signals(number)])
            signal.raise_signal(number)
