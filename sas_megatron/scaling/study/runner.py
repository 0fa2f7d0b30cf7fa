"""Execution of a study's runs on this machine, sequentially or in parallel.

The state is kept in the files of the runs only: a runner that is killed and started again resumes the runs
that are not finished.
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
from sas_megatron.fault_tolerance.stop_request import find_stop_signals
from sas_megatron.io.files import save_file
from sas_megatron.platform.local_machine import training_command, training_environment
from sas_megatron.scaling.numbers import format_loss
from sas_megatron.scaling.runs import has_finished
from sas_megatron.scaling.study.plan import Plan, PlannedRun
from sas_megatron.scaling.study.run_states import (
    acquire_lock,
    check_config,
    failure_path,
    find_dependency,
    is_locked,
    is_settled,
    last_error,
    log_path,
)

POLL_SECONDS = 0.2
# Interval at which it checks for runs that other processes have finished.
REFRESH_SECONDS = 5.0


@dataclass
class _Started:
    """A run whose processes were started."""

    run: PlannedRun
    process: subprocess.Popen[bytes]
    log_offset: int
    lock: contextlib.ExitStack


class StudyRunner:
    """Runs the unfinished runs of a plan, in its order, once their dependencies are met.

    Args:
        plan: Returns the current plan; more of its runs are ready after a sweep has finished.
        jobs: Maximum number of runs in parallel.
        log: Called with a line for each event.
        excluded: Names of runs that are not started here, since SLURM has a job for them.
    """

    def __init__(
        self,
        plan: Callable[[], Plan],
        *,
        jobs: int,
        log: Callable[[str], None],
        excluded: frozenset[str] = frozenset(),
    ) -> None:
        self._plan = plan
        self._excluded = excluded
        self._jobs = jobs
        self._log = log
        self._started: list[_Started] = []
        self._failed: set[str] = set()
        self._stop_requested = False

    def run(self, *, selected: Callable[[PlannedRun], bool]) -> bool:
        """Run until all selected runs are done, have failed or are blocked; return whether all are done.

        On SIGINT, SIGTERM or SIGHUP, the started runs save a checkpoint and stop.

        Raises:
            UserError: A run directory contains a run other than the planned one.
        """
        with self._signals():
            plan = self._plan()
            for run in plan.runs:
                # Check before any run is started, so that no run continues after an error.
                if run.is_ready and selected(run) and not is_settled(run):
                    check_config(run)
            while True:
                if not all(run.is_ready for run in plan.runs):
                    plan = self._plan()
                pending = [run for run in plan.runs if selected(run) and not is_settled(run)]
                self._start(plan, pending)
                if not self._started and not any(is_locked(run) for run in pending):
                    break
                self._wait()
        if not self._stop_requested:
            self._log_pending(pending)
        return not pending

    def _log_pending(self, pending: list[PlannedRun]) -> None:
        queued = [run for run in pending if run.name in self._excluded]
        if queued:
            self._log(f"not started, since they have SLURM jobs: {len(queued)} runs, first {queued[0].name}")
        waiting = [run for run in pending if run.name not in self._failed | self._excluded]
        if waiting:
            first = waiting[0]
            self._log(f"{len(waiting)} runs are waiting, first {first.name} for {find_dependency(first)}")

    def _start(self, plan: Plan, pending: list[PlannedRun]) -> None:
        skipped = {started.run.name for started in self._started} | self._failed | self._excluded
        for run in pending:
            if len(self._started) >= self._jobs or self._is_stopping():
                return
            if run.name in skipped or find_dependency(run) is not None:
                continue
            lock = contextlib.ExitStack()
            descriptor = lock.enter_context(acquire_lock(run))
            if descriptor is None or is_settled(run):  # in progress in another runner, or just finished there
                lock.close()
                continue
            try:
                started = self._launch(run, plan, lock, descriptor)
            except BaseException:
                lock.close()
                raise
            self._started.append(started)
            if self._is_stopping():  # by a signal during the launch, which did not reach the new process
                started.process.send_signal(signal.SIGTERM)

    def _is_stopping(self) -> bool:
        # A method, since the type checker does not know that a signal changes the attribute.
        return self._stop_requested

    def _launch(self, run: PlannedRun, plan: Plan, lock: contextlib.ExitStack, descriptor: int) -> _Started:
        check_config(run)
        failure_path(run).unlink(missing_ok=True)
        config = write_config(run)
        ranks = plan.study.machine.processes
        with log_path(run).open("ab") as log:
            offset = log.tell()
            process = subprocess.Popen(
                training_command(config, ranks=ranks),
                env=training_environment(ranks=ranks, num_concurrent_runs=self._jobs),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The lock is held until the last of these processes has ended.
                pass_fds=[descriptor],
                # Ctrl-C in a terminal reaches them only through this process, once.
                start_new_session=True,
            )
        self._log(f"{run.name}: started, {run.trained_steps:,} steps")
        return _Started(run, process, offset, lock)

    def _wait(self) -> None:
        """Wait until a started run has ended, at most `REFRESH_SECONDS`."""
        deadline = time.monotonic() + REFRESH_SECONDS
        while time.monotonic() < deadline:
            ended = [started for started in self._started if started.process.poll() is not None]
            for started in ended:
                self._started.remove(started)
                self._report_end(started)
                started.lock.close()
            if ended:
                return
            time.sleep(POLL_SECONDS)

    def _report_end(self, started: _Started) -> None:
        run, status = started.run, started.process.returncode
        if has_finished(run.directory):
            summary = json.loads((run.directory / "summary.json").read_text(encoding="utf-8"))
            loss = format_loss(summary["final_validation_loss"])
            self._log(f"{run.name}: done, validation loss {loss}, {summary['training_seconds']:.0f} s")
        elif (run.directory / "stopped.json").exists() and self._stop_requested:
            self._log(f"{run.name}: saved a checkpoint and stopped")
        elif self._stop_requested:  # the signal arrived before the run could handle it: not a failure
            self._log(f"{run.name}: stopped with status {status} before it saved a checkpoint")
        else:
            reason = last_error(log_path(run), offset=started.log_offset)
            self._failed.add(run.name)
            record = {
                "status": status,
                "reason": reason,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            text = json.dumps(record) + "\n"
            save_file(failure_path(run), text, remedy="choose another directory in the study file")
            self._log(f"{run.name}: failed with status {status}: {reason}")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, _frame: FrameType | None) -> None:
            if self._stop_requested:
                return
            self._stop_requested = True
            self._log(f"received {signal.Signals(number).name}: the started runs save a checkpoint and stop")
            for started in self._started:
                with contextlib.suppress(ProcessLookupError):
                    started.process.send_signal(signal.SIGTERM)

        before: dict[signal.Signals, Any] = {}
        for number in find_stop_signals((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)):
            before[number] = signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def write_config(run: PlannedRun) -> Path:
    """Write the config from which the run is started, and return its path."""
    path = run.directory.parents[1] / "configs" / f"{run.name}.yaml"
    save_file(path, dump_yaml(run.config), remedy="choose another directory in the study file")
    return path
