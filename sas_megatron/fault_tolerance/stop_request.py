"""Orderly stop of a run: after a signal or a time limit, at the end of a step, on all ranks.

signal or time limit -> `StopRequest.reason` on this rank -> all ranks, with the loss of the step
  -> save a checkpoint -> exit with STOPPED_STATUS

A signal that arrives before the first step is pending until the end of that step. A second signal ends the
process at once, as the first signal would without this module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType

# From schedulers (SIGTERM, SIGUSR1), a keyboard (SIGINT) and a terminal that closes (SIGHUP).
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# EX_TEMPFAIL of sysexits.h: the failure is temporary, and the command can be repeated.
STOPPED_STATUS = 75
# torchrun and the scheduler may each send a signal for the same stop; within this time they count as one.
DUPLICATE_SIGNAL_SECONDS = 2.0

STOP_AFTER_SECONDS = "stop_after_seconds"


@dataclass(frozen=True)
class RunExit:
    """The reason why a run ended without an error, and whether it can be resumed."""

    reason: str
    is_resumable: bool = False

    @property
    def exit_status(self) -> int:
        """The exit status of the process: `STOPPED_STATUS` if the run can be resumed, else 0."""
        return STOPPED_STATUS if self.is_resumable else 0


def find_stop_signals(candidates: Sequence[signal.Signals] = STOP_SIGNALS) -> list[signal.Signals]:
    """Return the candidates without those that this process ignores already.

    nohup, for example, starts a process that ignores SIGHUP.
    """
    return [number for number in candidates if signal.getsignal(number) is not signal.SIG_IGN]


class StopRequest:
    """Receives the requests to stop on this rank, for the duration of a `with` block in the main thread.

    The first signal in the block becomes the reason to stop, and the second one has its previous effect. With
    several ranks this holds only once they have met: their failure watchdogs then receive the signals and
    call `handle_signal`. Before that a signal ends the process, since other ranks may have ended as well. The
    run directory must not be changed before the ranks have met.

    Args:
        after_seconds: Time limit, counted from now; None for no limit.
        world_size: Number of ranks.
        logs: Whether this rank acknowledges a signal on stderr.
    """

    def __init__(self, *, after_seconds: float | None, world_size: int = 1, logs: bool = False) -> None:
        self._deadline = None if after_seconds is None else time.monotonic() + after_seconds
        # Reentrant, because a signal can arrive while the handler runs for another one.
        self._lock = threading.RLock()
        self._is_single_rank = world_size == 1
        self._logs = logs
        self._has_begun_steps = False
        self._ignores_signals = False
        self._signal: signal.Signals | None = None
        self._received_at = 0.0

    def __enter__(self) -> StopRequest:
        self._old_handlers = {
            number: signal.signal(number, self._on_signal) for number in find_stop_signals()
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old_handlers.items():
            # When the first process exits with a status other than 0, torchrun sends signals to the others.
            signal.signal(number, signal.SIG_IGN if self._ignores_signals else handler)

    def begin_steps(self) -> None:
        """Record that the training steps begin, for the acknowledgement of a signal."""
        self._has_begun_steps = True

    def ignore_signals(self) -> None:
        """Ignore further signals: everything is saved and the process is about to exit."""
        self._ignores_signals = True

    def handle_signal(self, number: int) -> bool:
        """Return whether a signal needs no further handling; the first one becomes the reason to stop.

        Any thread may call it, and it may be called more than once for each signal.
        """
        with self._lock:
            if self._ignores_signals:
                return True
            if self._signal is not None:
                return time.monotonic() - self._received_at < DUPLICATE_SIGNAL_SECONDS
            self._signal, self._received_at = signal.Signals(number), time.monotonic()
        if self._logs:
            step = "this step" if self._has_begun_steps else "the first step"
            text = f"received {self._signal.name}: saving after {step}; another signal ends at once"
            # `print` is not reentrant, and may be what was interrupted. The terminal may have closed.
            with contextlib.suppress(OSError):
                os.write(2, f"{text}\n".encode())
        return True

    @property
    def reason(self) -> str | None:
        """The reason to stop, in the form of `exit_reason` in summary.json; None if there is none."""
        if self._signal is not None:
            return f"signal {self._signal.name}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return STOP_AFTER_SECONDS
        return None

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not ((self._is_single_rank or self._has_begun_steps) and self.handle_signal(number)):
            signal.signal(number, self._old_handlers[signal.Signals(number)])
            signal.raise_signal(number)
