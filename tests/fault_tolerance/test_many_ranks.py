"""A stop and a fault report of many ranks: the requests of each rank, and the seconds with a real store."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from sas_megatron.fault_tolerance import failure_watchdog
from sas_megatron.fault_tolerance.failure_watchdog import FailureWatchdog
from sas_megatron.fault_tolerance.final_report import StatusKind, StatusReport
from sas_megatron.fault_tolerance.status_store import StatusStore
from tests.fork_server import ForkedCommand
from tests.selection import exhaustive

ERROR = StatusReport(StatusKind.FAILED, "ValueError: no good")
NUM_CLIENTS, CLIENTS_PER_PROCESS = 256, 32


class CountedStore:
    """A store that counts the requests of each kind."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.requests: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: Any) -> Any:
            self.requests[name] += 1
            return getattr(self._store, name)(*arguments)

        return request


def requests_of_a_rank(world_size: int, rank: int) -> tuple[int, int]:
    """Return the requests of one rank in an alive check, and in the report of an error of all ranks."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # missing from torch's stubs
    ranks = [StatusStore(store, rank=number, world_size=world_size) for number in range(world_size)]
    for other in ranks:
        other.write_host()
        other.confirm_alive()
    watchdog = FailureWatchdog(store, rank=rank, world_size=world_size, timeout_minutes=1)
    status = ranks[rank]
    counted = status._store = CountedStore(status._store)  # type: ignore[assignment]
    status.request_alive_check()
    assert status.are_all_alive()
    of_check = counted.requests.total()
    for other in ranks:
        other.write_report(ERROR)
    watchdog._traceback = "the traceback"
    watchdog._print_report(status)
    return of_check, counted.requests.total() - of_check


def test_the_requests_of_a_rank_do_not_depend_on_the_number_of_ranks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert requests_of_a_rank(8, 3) == requests_of_a_rank(300, 3) == (2, 2)
    assert capsys.readouterr().err == ""
    assert requests_of_a_rank(8, 0) == requests_of_a_rank(300, 0) == (2, 5)
    errors = capsys.readouterr().err
    assert errors.count("the traceback") == 2
    assert errors.count("ranks 0-299 on") == 1


def test_ranks_without_a_report_or_a_step_are_known_by_their_host() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    first, second, _ = (StatusStore(store, rank=rank, world_size=3) for rank in range(3))
    first.write_host()
    second.write_host()
    second.write_step(7)
    first.write_report(StatusReport(StatusKind.RUNNING, "a line"))
    first.write_report(ERROR)
    reports = first.read_reports()
    assert reports == {0: ERROR}
    statuses = first.read_statuses(reports)
    assert [status.last_step for status in statuses] == [None, 7, None]
    assert [status.host is None for status in statuses] == [False, False, True]
    assert [status.report for status in statuses] == [ERROR, None, None]


def test_many_ranks_poll_their_store_less_often() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    for world_size, seconds in ((2, 0.1), (256, 0.1), (1024, 0.4)):
        watchdog = FailureWatchdog(store, rank=0, world_size=world_size, timeout_minutes=1)
        assert watchdog._counter_poll_seconds == pytest.approx(seconds)


@exhaustive
def test_256_clients_finish_a_stop_and_a_fault_report_within_five_seconds(tmp_path: Path) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    start_file = tmp_path / "start"
    processes = [
        ForkedCommand(
            *(first, CLIENTS_PER_PROCESS, NUM_CLIENTS, store.port, start_file),
            module="tests.fault_tolerance.many_ranks",
            environment={**os.environ},
        )
        for first in range(0, NUM_CLIENTS, CLIENTS_PER_PROCESS)
    ]
    try:
        _wait_for_lines(processes, 1)
        started = time.monotonic()
        start_file.touch()
        _wait_for_lines(processes, 2)
        ended = max(float(process.output().splitlines()[1]) for process in processes)
        reports = [process.errors() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert sum(text.count("training stopped after step 3: ranks 0-255 on") for text in reports) == 1
    assert ended - started < failure_watchdog.GRACE_SECONDS


def _wait_for_lines(processes: list[ForkedCommand], count: int) -> None:
    deadline = time.monotonic() + 120
    while any(process.output().count("\n") < count for process in processes):
        assert time.monotonic() < deadline, [process.errors()[-500:] for process in processes]
        time.sleep(0.02)
