"""A watchdog that ends all ranks after a failure on any of them, with one final report.

A failure, an exception or a signal:

    the failing rank       -> requests a stop in the store that all ranks share (`status_store`)
    every rank alive       -> writes a status report: an error, a lost connection, or its current line of code
    after a grace period   -> the lowest rank with a report prints the final report; all exit with status 1

A signal that the application handles, such as a request to save and stop. torchrun also sends such signals to
the remaining ranks after one rank has died, so the watchdog must find out which case it is:

    the rank that got it   -> requests an alive check in the store
    every rank alive       -> confirms
    after a grace period   -> all ranks have confirmed: training continues; otherwise: as after a failure

The watchdog runs in a separate thread, because the main thread may be inside a collective, which neither an
exception nor a Python signal handler can interrupt.

With NCCL, NCCL's own watchdog aborts a process whose collective timed out (SIGABRT, -6 in torchrun's table)
and prints a message that names the collective. Such a rank reports no status. The ranks that torchrun then
stops still report, and list it together with the ranks that hung.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from sas_megatron.config.errors import UserError
from sas_megatron.fault_tolerance.final_report import (
    TRAINING,
    Activity,
    StatusKind,
    StatusReport,
    describe_lost_store,
    describe_stop,
    is_hang,
)
from sas_megatron.fault_tolerance.flight_recorder import FlightRecorder
from sas_megatron.fault_tolerance.status_store import StatusStore
from sas_megatron.fault_tolerance.stop_request import find_stop_signals

# How long ranks wait for each other's status: several polls, and well below the 30 s after which torchrun
# kills processes that have not ended.
GRACE_SECONDS = 5.0
POLL_SECONDS = 1.0
COUNTER_POLL_SECONDS = 0.1
# With more ranks than this, each polls less often, so that the store answers as many requests per second.
RANKS_AT_FULL_RATE = 256
EXIT_STATUS = 1  # user errors exit with 2


class FailureWatchdog:
    """A context manager in which a failure on any rank ends all ranks, with one final report.

    The signals of `find_stop_signals` end all ranks as well, unless `handles_signal` returns True. A
    `UserError` passes through, because all ranks are expected to raise it. In a world of one rank nothing is
    watched, and all errors pass through. The main thread must enter it.

    Args:
        store: The store of the rendezvous.
        rank: This rank.
        world_size: The number of ranks.
        timeout_minutes: The timeout of collectives, for the final report.
        handles_signal: Called in the watchdog's thread with a signal number; returns whether the application
            handles the signal.
        flight_recorder: Writes the last collectives of this rank if the run hangs.
        activity: What the ranks do, for the final report.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        timeout_minutes: float,
        handles_signal: Callable[[int], bool] = lambda _number: False,
        flight_recorder: FlightRecorder | None = None,
        activity: Activity = TRAINING,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._timeout_minutes = timeout_minutes
        self._handles_signal = handles_signal
        self._flight_recorder = flight_recorder
        self._activity = activity
        self._status = StatusStore(store, rank=rank, world_size=world_size)
        self._records_steps = world_size > 1
        self._last_step: int | None = None
        self._error_report: StatusReport | None = None
        self._traceback: str | None = None
        self._exited = threading.Event()
        self._counter_poll_seconds = COUNTER_POLL_SECONDS * max(1.0, world_size / RANKS_AT_FULL_RATE)
        self._is_confirmed_alive = False
        # The deadline of the alive check that this rank has requested, and the signal that caused it.
        self._alive_check: tuple[float, signal.Signals] | None = None

    def __enter__(self) -> FailureWatchdog:
        if self.world_size == 1:
            return self
        self._status.write_host()
        self._thread_status = self._status.clone()
        self._main_thread = threading.get_ident()
        self._launcher = os.getppid()
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        # Python writes the number of a signal here at once, whatever the main thread is doing.
        self._old_wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, _ignore_signal) for number in find_stop_signals()}
        self._thread = threading.Thread(target=self._watch, name="failure watchdog", daemon=True)
        self._thread.start()
        return self

    def finish_step(self, step: int) -> None:
        """Record that this rank has finished `step` (0: it is about to start the first step)."""
        self._last_step = step
        if not self._records_steps:
            return
        try:
            self._status.write_step(step)
        except dist.DistError:
            self._records_steps = False  # a lost store does no harm until something else fails

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world_size == 1:
            return
        if error is None or isinstance(error, UserError):
            if error is not None:
                with contextlib.suppress(dist.DistError):
                    self._status.write_report(StatusReport(StatusKind.FAILED, _first_line(error)))
            self._stop_watching()
            if error is None:
                self._wait_until_all_exit()
            return
        report = _report_of_error(error)
        if report.kind == StatusKind.FAILED:
            self._traceback = "".join(traceback.format_exception(error))
        self._error_report = report
        self._wake.send(b"\0")
        # The watchdog's thread ends the process, unless it is blocked: the host of the store may be
        # unreachable without having closed its connections.
        time.sleep(2 * GRACE_SECONDS)
        self._end_without_store()

    def _stop_watching(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._exited.set()
        self._wake.send(b"\0")
        self._thread.join(timeout=GRACE_SECONDS)
        self._wake.close()
        self._woken.close()

    def _wait_until_all_exit(self) -> None:
        """Keep rank 0, which may host the store, until all watchdogs have polled for the last time."""
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(dist.DistError):
            num_exited = self._status.increment("num_exited")
            while self.rank == 0 and num_exited < self.world_size and time.monotonic() < deadline:
                time.sleep(COUNTER_POLL_SECONDS)
                num_exited = self._status.count("num_exited")

    # The methods below run in the watchdog's thread.

    def _watch(self) -> None:
        status, is_store_reachable = self._thread_status, True
        while not self._exited.is_set():
            received = self._wait_for_signals(POLL_SECONDS)
            if self._exited.is_set():
                return
            termination = self._find_termination(received)
            try:
                is_stop_requested = is_store_reachable and status.is_stop_requested()
                if is_store_reachable:
                    termination = self._check_alive(status) or termination
            except dist.DistError:
                is_stop_requested = is_store_reachable = False
            if termination is not None or is_stop_requested or self._error_report is not None:
                self._end_run(termination or self._report_current_line())
                return

    def _wait_for_signals(self, seconds: float) -> bytes:
        ready, _, _ = select.select([self._woken], [], [], seconds)
        return self._woken.recv(64) if ready else b""

    def _find_termination(self, received: bytes) -> StatusReport | None:
        """Return a report if a signal or the end of the launcher terminates this rank.

        A signal that the application handles starts an alive check instead.
        """
        for number in self._old_handlers:
            if number in received:
                if not self._handles_signal(number):
                    return StatusReport(StatusKind.TERMINATED, f"received {number.name}")
                self._alive_check = self._alive_check or (time.monotonic() + GRACE_SECONDS, number)
        # If torchrun is killed, its processes stay alive.
        if dist.is_torchelastic_launched() and os.getppid() != self._launcher:
            return StatusReport(StatusKind.TERMINATED, "lost torchrun, which was killed")
        return None

    def _check_alive(self, status: StatusStore) -> StatusReport | None:
        """Request and answer alive checks; return a report if the check of this rank failed."""
        if self._alive_check is not None:
            status.request_alive_check()
        if not self._is_confirmed_alive and status.is_alive_check_requested():
            status.confirm_alive()
            self._is_confirmed_alive = True
        if self._alive_check is None or time.monotonic() < self._alive_check[0]:
            return None
        _, number = self._alive_check
        if status.are_all_alive():
            self._alive_check = None
            return None
        return StatusReport(StatusKind.TERMINATED, f"received {number.name}")

    def _report_current_line(self) -> StatusReport:
        """Return a report with the line of code that the main thread executes."""
        frame = sys._current_frames().get(self._main_thread)
        return StatusReport(
            StatusKind.RUNNING, "an unknown line" if frame is None else _describe_frame(frame)
        )

    def _end_run(self, report: StatusReport) -> None:
        """Write this rank's report, wait for the others, print the final report on one rank, and exit."""
        status, deadline = self._thread_status, time.monotonic() + GRACE_SECONDS
        try:
            status.request_stop()
            status.increment("num_reports")
            status.write_report(report)
            while time.monotonic() < deadline and status.count("num_error_reports") < self.world_size:
                if self._exited.is_set():
                    return
                self._write_error_report(status)
                time.sleep(self._counter_poll_seconds)
            self._print_report(status)
            self._wait_for_reporting_ranks(status)
        except dist.DistError:
            time.sleep(max(0.0, deadline - time.monotonic()))
            if self._exited.is_set():
                return
            self._end_without_store()
        _end_process()

    def _wait_for_reporting_ranks(self, status: StatusStore) -> None:
        """Wait briefly for ranks whose grace period began later, which may use a store on this host."""
        deadline = time.monotonic() + 2 * POLL_SECONDS

        def wait_until(counter: str, *, short_of_all: int) -> None:
            while time.monotonic() < deadline:
                if status.count(counter) >= status.count("num_reports") - short_of_all:
                    return
                time.sleep(self._counter_poll_seconds)

        with contextlib.suppress(dist.DistError):
            status.increment("num_done")
            wait_until("num_done", short_of_all=0)
            if self.rank != 0:
                status.increment("num_ended")
            else:  # without torchrun's agent, rank 0 hosts the store
                wait_until("num_ended", short_of_all=1)

    def _write_error_report(self, status: StatusStore) -> None:
        """Replace the first report once the main thread has raised an error, which explains more."""
        report, self._error_report = self._error_report, None
        if report is not None:
            status.write_report(report)
            status.increment("num_error_reports")

    def _print_report(self, status: StatusStore) -> None:
        reports = status.read_reports()
        records = None
        if self._flight_recorder is not None and is_hang(map(reports.get, range(self.world_size))):
            self._flight_recorder.write()
            records = self._flight_recorder.folder
        # The traceback of an error that many ranks raised is printed once.
        same_error = [rank for rank, report in reports.items() if report == reports[self.rank]]
        if self._traceback is not None and min(same_error) == self.rank:
            _print_error(f"rank {self.rank} on {socket.gethostname()}:\n{self._traceback}")
        if min(reports) == self.rank and status.increment("num_printers") == 1:
            _print_error(
                describe_stop(
                    status.read_statuses(reports),
                    timeout_minutes=self._timeout_minutes,
                    flight_records=records,
                    activity=self._activity,
                )
            )

    def _end_without_store(self) -> NoReturn:
        if self._traceback is not None:
            _print_error(f"rank {self.rank} on {socket.gethostname()}:\n{self._traceback}")
        # The ranks cannot agree on one that prints, so the first rank of each host prints.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            address = os.environ.get("MASTER_ADDR", "rank 0")
            _print_error(describe_lost_store(address, self._last_step, self._activity))
        _end_process()


def _ignore_signal(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: Python has written the signal to the socket that wakes the watchdog's thread."""


def _print_error(text: str) -> None:
    print(f"sas-megatron: {text}", file=sys.stderr, flush=True)


def _end_process() -> NoReturn:
    # The stack is not unwound, because a main thread in a collective cannot be interrupted, and destroying
    # process groups that other ranks have left may block.
    sys.stdout.flush()
    os._exit(EXIT_STATUS)


def _report_of_error(error: BaseException) -> StatusReport:
    # gloo raises plain RuntimeErrors that name its source file; NCCL and the store have error types of their
    # own.
    is_lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return StatusReport(StatusKind.CONNECTION_LOST if is_lost else StatusKind.FAILED, _first_line(error))


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _describe_frame(frame: FrameType) -> str:
    file = "/".join(frame.f_code.co_filename.split("/")[-2:])
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"
