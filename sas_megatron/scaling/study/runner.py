"""A study's runs on this machine, one after another or side by side.

Nothing is remembered but what the runs' own files tell: killed at any moment and started again, it goes on
with what is not finished.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from sas_megatron.config.loading import dump_yaml
from sas_megatron.io.files import save_file
from sas_megatron.platform.local_machine import training_command, training_environment
from sas_megatron.scaling.numbers import format_loss
from sas_megatron.scaling.runs import has_finished
from sas_megatron.scaling.study.plan import Plan, PlannedRun
from sas_megatron.scaling.study.run_states import (
    check_as_planned,
    failure_of,
    is_locked,
    is_settled,
    last_error,
    locked,
    log_of,
    what_it_waits_for,
)

POLL_SECONDS = 0.2
# How often it looks for what others have finished, while none of its own has ended.
LOOK_SECONDS = 5.0
Say = Callable[[str], None]


@dataclass
class _Started:
    """A run whose processes are at work."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log_offset: int
    lock: contextlib.ExitStack


class StudyRunner:
    """Runs what is not finished, in the plan's order, as far as it does not wait for others."""

    def __init__(
        self, plan: Callable[[], Plan], *, jobs: int, say: Say, elsewhere: frozenset[str] = frozenset()
    ) -> None:
        """`plan` gives the plan as it is now: it grows when a sweep has ended; `elsewhere` are left alone."""
        self._plan = plan
        self._elsewhere = elsewhere
        self._jobs = jobs
        self._say = say
        self._started: list[_Started] = []
        self._failed: set[str] = set()
        self._stop_asked = False

    def run(self, *, wanted: Callable[[PlannedRun], bool]) -> bool:
        """Until all that is wanted is done or cannot go on; whether all is done.

        On SIGINT or SIGTERM the runs at work save and stop.

        Raises:
            UserError: a run directory holds another run than is planned.
        """
        with self._signals():
            plan = self._plan()
            for run in plan.runs:
                # Before any is started, so that none goes on behind an error.
                if run.is_ready and wanted(run) and not is_settled(run):
                    check_as_planned(run)
            while True:
                if not all(run.is_ready for run in plan.runs):
                    plan = self._plan()
                pending = [run for run in plan.runs if wanted(run) and not is_settled(run)]
                self._start(plan, pending)
                if not self._started and not any(is_locked(run) for run in pending):
                    break
                self._wait()
        if not self._stop_asked:
            self._tell_what_is_left(pending)
        return not pending

    def _tell_what_is_left(self, pending: list[PlannedRun]) -> None:
        queued = [run for run in pending if run.name in self._elsewhere]
        if queued:
            self._say(f"left to SLURM, which has their jobs: {len(queued)}, the first {queued[0].name}")
        waiting = [run for run in pending if run.name not in self._failed | self._elsewhere]
        if waiting:
            self._say(
                f"{len(waiting)} runs wait for others: {waiting[0].name} {what_it_waits_for(waiting[0])}"
            )

    def _start(self, plan: Plan, pending: list[PlannedRun]) -> None:
        at_work = {started.run.name for started in self._started}
        for run in pending:
            if len(self._started) >= self._jobs or self._stop_asked:
                return
            if run.name in at_work | self._failed | self._elsewhere or what_it_waits_for(run) is not None:
                continue
            lock = contextlib.ExitStack()
            descriptor = lock.enter_context(locked(run))
            if descriptor is None or is_settled(run):  # somebody else's, or just finished by them
                lock.close()
                continue
            try:
                self._started.append(self._launch(run, plan, lock, descriptor))
            except BaseException:
                lock.close()
                raise

    def _launch(self, run: PlannedRun, plan: Plan, lock: contextlib.ExitStack, descriptor: int) -> _Started:
        check_as_planned(run)
        failure_of(run).unlink(missing_ok=True)
        config = write_config(run)
        ranks = plan.study.machine.processes
        with log_of(run).open("ab") as log:
            offset = log.tell()
            process = subprocess.Popen(
                training_command(config, ranks=ranks),
                env=training_environment(ranks=ranks, num_concurrent_runs=self._jobs),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The lock lasts until the last of them has ended.
                pass_fds=[descriptor],
                # A terminal's Ctrl-C reaches them through this process alone, once.
                start_new_session=True,
            )
        self._say(f"{run.name}: started, {run.own_steps:,} steps")
        return _Started(run, process, offset, lock)

    def _wait(self) -> None:
        """Until one of its runs has ended, or it is time to look what others have done."""
        deadline = time.monotonic() + LOOK_SECONDS
        while time.monotonic() < deadline:
            ended = [started for started in self._started if started.process.poll() is not None]
            for started in ended:
                self._started.remove(started)
                self._tell_end(started)
                started.lock.close()
            if ended:
                return
            time.sleep(POLL_SECONDS)

    def _tell_end(self, started: _Started) -> None:
        run, status = started.run, started.process.returncode
        if has_finished(run.directory):
            summary = json.loads((run.directory / "summary.json").read_text(encoding="utf-8"))
            loss = format_loss(summary["final_validation_loss"])
            self._say(f"{run.name}: done, validation loss {loss}, {summary['training_seconds']:.0f} s")
        elif (run.directory / "stopped.json").exists() and self._stop_asked:
            self._say(f"{run.name}: saved and stopped")
        else:
            reason = last_error(log_of(run), offset=started.log_offset)
            self._failed.add(run.name)
            record = {
                "status": status,
                "reason": reason,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            text = json.dumps(record) + "\n"
            save_file(failure_of(run), text, remedy="choose another directory in the study file")
            self._say(f"{run.name}: failed with status {status}: {reason}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, _frame: FrameType | None) -> None:
            if self._stop_asked:
                return
            self._stop_asked = True
            self._say(f"received {signal.Signals(number).name}: the runs at work save and stop")
            for started in self._started:
                with contextlib.suppress(ProcessLookupError):
                    started.process.send_signal(signal.SIGTERM)

        before: dict[signal.Signals, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def write_config(run: PlannedRun) -> Path:
    """The run's config as a file of the study, for whatever starts it."""
    path = run.directory.parents[1] / "configs" / f"{run.name}.yaml"
    save_file(path, dump_yaml(run.config), remedy="choose another directory in the study file")
    return path
