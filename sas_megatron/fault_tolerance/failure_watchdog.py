"""Who is still there when a run stops: every rank leaves notes in the store through which all met.

a step is done         -> store["step/3"]
something goes wrong   -> store["called"]; an exception or a signal here, or another rank's call
each rank that lives   -> store["answer/3"]: an error of its own, a lost peer, or where it stands
after a short grace    -> the lowest that answered prints one report; every process ends with status 1

a signal that is taken care of elsewhere, as an order to stop -> store["muster"]
each rank that lives   -> store["present/3"]
after the same grace   -> all are there, or it was no order: torchrun also sends signals when a rank died

A thread watches, since the main thread may be inside a collective, which neither an exception nor a
signal handler of Python can interrupt.

With NCCL a collective that is over time is ended by NCCL's watchdog, which aborts the process
(SIGABRT, -6 in torchrun's table) with a message that names the collective. Ranks so ended do not
answer; those that torchrun then stops still report, and list them with the ones that hung.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from sas_megatron.config.errors import UserError
from sas_megatron.fault_tolerance.final_report import (
    Answer,
    AnswerKind,
    Standing,
    describe_lost_store,
    describe_stop,
    is_hang,
)
from sas_megatron.fault_tolerance.flight_recorder import FlightRecorder

# How long ranks wait for each other's answers: some looks, and well under the 30 s after which
# torchrun kills what has not ended.
GRACE_SECONDS = 5.0
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_COUNTS = 0.1
EXIT_STATUS = 1  # 2 is for what the user can mend

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class FailureWatchdog:
    """For the length of a `with` block an error on any rank ends the process on all, with one report.

    Inside it SIGTERM, SIGINT and SIGUSR1 end all ranks, each after its answer, but for a signal that
    `takes_signal` says is taken care of. A `UserError` passes, as every rank is expected to meet it
    alike. In a world of one nothing is watched and errors pass as they are. The main thread must
    enter it.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        world_size: int,
        timeout_minutes: float,
        takes_signal: Callable[[int], bool] = lambda _number: False,
        flight_recorder: FlightRecorder | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._timeout_minutes = timeout_minutes
        self._takes_signal = takes_signal
        self._flight_recorder = flight_recorder
        self._base = store
        self._store = PrefixStore("roll_call", store)
        self._leaves_notes = world_size > 1
        self._last_step: int | None = None
        self._answer: Answer | None = None
        self._traceback: str | None = None
        self._left = threading.Event()
        self._is_present = False
        # When all must have answered the muster, and the signal that it was held for.
        self._muster: tuple[float, signal.Signals] | None = None

    def __enter__(self) -> FailureWatchdog:
        if self.world_size == 1:
            return self
        self._store.set(f"host/{self.rank}", socket.gethostname())
        # A connection of its own: one client serves one thread at a time, and may be held for long.
        connection = self._base.clone()  # type: ignore[attr-defined]  # its stubs do not have it
        self._watchers_store = PrefixStore("roll_call", connection)
        self._main_thread = threading.get_ident()
        self._launcher = os.getppid()
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        # The number of a signal is written there at once, whatever the main thread is doing.
        self._old_wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._old_handlers = {number: signal.signal(number, _leave_it_to_the_watcher) for number in _SIGNALS}
        self._watcher = threading.Thread(target=self._watch, name="roll call", daemon=True)
        self._watcher.start()
        return self

    def finish_step(self, step: int) -> None:
        """Notes that this rank has finished `step` (0: it is about to begin the first)."""
        self._last_step = step
        if not self._leaves_notes:
            return
        try:
            self._store.set(f"step/{self.rank}", str(step))
        except dist.DistError:
            self._leaves_notes = False  # a lost store hurts nobody until something else goes wrong

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world_size == 1:
            return
        if error is None or isinstance(error, UserError):
            if error is not None:
                with contextlib.suppress(dist.DistError):
                    _put_answer(self._store, self.rank, Answer(AnswerKind.FAILED, _one_line(error)))
            self._leave()
            if error is None:
                self._see_all_leave()
            return
        answer = _answer_of(error)
        if answer.kind == AnswerKind.FAILED:
            self._traceback = "".join(traceback.format_exception(error))
        self._answer = answer
        self._wake.send(b"\0")
        # The watcher ends the process. If it cannot, the host of the store went dark without closing
        # its connections.
        time.sleep(2 * GRACE_SECONDS)
        self._end_without_store()

    def _leave(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._left.set()
        self._wake.send(b"\0")
        self._watcher.join(timeout=GRACE_SECONDS)
        self._wake.close()
        self._woken.close()

    def _see_all_leave(self) -> None:
        """Keeps rank 0, which may host the store, until the watchers of all have looked for the last time."""
        deadline = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(dist.DistError):
            num_left = self._store.add("left", 1)
            while self.rank == 0 and num_left < self.world_size and time.monotonic() < deadline:
                time.sleep(SECONDS_BETWEEN_COUNTS)
                num_left = self._store.add("left", 0)

    # What follows runs on the watching thread.

    def _watch(self) -> None:
        looks_at_store = True
        while not self._left.is_set():
            received = self._wait_for_wake(SECONDS_BETWEEN_LOOKS)
            if self._left.is_set():
                return
            told = self._order_to_end(received)
            try:
                called = looks_at_store and self._watchers_store.check(["called"])
                if looks_at_store:
                    told = self._attend_muster() or told
            except dist.DistError:
                called = looks_at_store = False
            if told is not None or called or self._answer is not None:
                self._conclude(told or self._place())
                return

    def _wait_for_wake(self, seconds: float) -> bytes:
        ready, _, _ = select.select([self._woken], [], [], seconds)
        return self._woken.recv(64) if ready else b""

    def _order_to_end(self, received: bytes) -> Answer | None:
        for number in _SIGNALS:
            if number in received:
                if not self._takes_signal(number):
                    return Answer(AnswerKind.TOLD, f"received {number.name}")
                self._muster = self._muster or (time.monotonic() + GRACE_SECONDS, number)
        # torchrun does not take its processes with it when it is killed.
        if dist.is_torchelastic_launched() and os.getppid() != self._launcher:
            return Answer(AnswerKind.TOLD, "lost torchrun, which was killed")
        return None

    def _attend_muster(self) -> Answer | None:
        """Holds the muster where this rank took a signal, answers one; gives word where a rank is absent."""
        store = self._watchers_store
        if self._muster is not None:
            store.set("muster", "")
        if not self._is_present and store.check(["muster"]):
            store.set(f"present/{self.rank}", "")
            self._is_present = True
        if self._muster is None or time.monotonic() < self._muster[0]:
            return None
        _, number = self._muster
        if all(store.check([f"present/{rank}"]) for rank in range(self.world_size)):
            self._muster = None
            return None
        return Answer(AnswerKind.TOLD, f"received {number.name}")

    def _place(self) -> Answer:
        """The line that the main thread is at."""
        frame = sys._current_frames().get(self._main_thread)
        return Answer(AnswerKind.STANDS, "an unknown place" if frame is None else _describe_frame(frame))

    def _conclude(self, first: Answer) -> None:
        """Answers, waits for the others' answers, reports where that falls to this rank, ends the process."""
        store, deadline = self._watchers_store, time.monotonic() + GRACE_SECONDS
        try:
            store.set("called", "")
            store.add("answers", 1)
            _put_answer(store, self.rank, first)
            while time.monotonic() < deadline and store.add("last_words", 0) < self.world_size:
                if self._left.is_set():
                    return
                self._give_last_word(store)
                time.sleep(SECONDS_BETWEEN_COUNTS)
            self._report(store)
            self._end_with_the_others(store)
        except dist.DistError:
            time.sleep(max(0.0, deadline - time.monotonic()))
            if self._left.is_set():
                return
            self._end_without_store()
        _end_process()

    def _end_with_the_others(self, store: Store) -> None:
        """Waits shortly for those whose grace began later: this host may keep the store that they use."""
        deadline = time.monotonic() + 2 * SECONDS_BETWEEN_LOOKS

        def wait_until(counter: str, *, short_of_all: int) -> None:
            while time.monotonic() < deadline:
                if store.add(counter, 0) >= store.add("answers", 0) - short_of_all:
                    return
                time.sleep(SECONDS_BETWEEN_COUNTS)

        with contextlib.suppress(dist.DistError):
            store.add("reported", 1)
            wait_until("reported", short_of_all=0)
            if self.rank != 0:
                store.add("ended", 1)
            else:  # without torchrun's agent it hosts the store itself
                wait_until("ended", short_of_all=1)

    def _give_last_word(self, store: Store) -> None:
        """Replaces the first answer once the main thread's error is known, which is better knowledge."""
        answer, self._answer = self._answer, None
        if answer is not None:
            _put_answer(store, self.rank, answer)
            store.add("last_words", 1)

    def _report(self, store: Store) -> None:
        standings = list(self._read_standings(store))
        records = None
        if self._flight_recorder is not None and is_hang(standings):
            self._flight_recorder.write()
            records = self._flight_recorder.folder
        lowest = next(rank for rank in range(self.world_size) if store.check([f"answer/{rank}"]))
        reports = lowest == self.rank and store.add("reports", 1) == 1
        if not reports and self._traceback is None:
            return
        alike = [s.rank for s in standings if s.answer == standings[self.rank].answer]
        # An error that many ranks met alike is shown once.
        if self._traceback is not None and alike[0] == self.rank:
            self._say(f"rank {self.rank} on {socket.gethostname()}:\n{self._traceback}")
        if reports:
            self._say(describe_stop(standings, timeout_minutes=self._timeout_minutes, flight_records=records))

    def _read_standings(self, store: Store) -> Iterator[Standing]:
        def read(key: str) -> str | None:
            return store.get(key).decode() if store.check([key]) else None

        for rank in range(self.world_size):
            step, answer = read(f"step/{rank}"), read(f"answer/{rank}")
            yield Standing(
                rank,
                host=read(f"host/{rank}"),
                last_step=None if step is None else int(step),
                answer=None if answer is None else _parse_answer(answer),
            )

    def _end_without_store(self) -> NoReturn:
        if self._traceback is not None:
            self._say(f"rank {self.rank} on {socket.gethostname()}:\n{self._traceback}")
        # Nobody can be agreed on as the one to speak: it is the first of each host.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            self._say(describe_lost_store(os.environ.get("MASTER_ADDR", "rank 0"), self._last_step))
        _end_process()

    @staticmethod
    def _say(text: str) -> None:
        print(f"sas-megatron: {text}", file=sys.stderr, flush=True)


def _leave_it_to_the_watcher(_number: int, _frame: FrameType | None) -> None:
    """What Python calls for the signals; the watcher has been woken by then."""


def _end_process() -> NoReturn:
    # Not by unwinding: a main thread in a collective cannot be, and destroying groups that other ranks
    # have left may wait for them.
    sys.stdout.flush()
    os._exit(EXIT_STATUS)


def _answer_of(error: BaseException) -> Answer:
    # gloo raises plain RuntimeErrors that name its source file; NCCL and the store have their own types.
    is_lost = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
    return Answer(AnswerKind.LOST if is_lost else AnswerKind.FAILED, _one_line(error))


def _one_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _describe_frame(frame: FrameType) -> str:
    file = "/".join(frame.f_code.co_filename.split("/")[-2:])
    return f"{file}:{frame.f_lineno} in {frame.f_code.co_name}"


def _put_answer(store: Store, rank: int, answer: Answer) -> None:
    store.set(f"answer/{rank}", json.dumps([answer.kind, answer.text]))


def _parse_answer(text: str) -> Answer:
    kind, words = json.loads(text)
    return Answer(AnswerKind(kind), words)
