"""The status of every rank in the store of the rendezvous, where all ranks can read it.

    host/3                   the host of rank 3
    step/3                   the last step that rank 3 has finished
    stop_requested           set by the first rank that fails or is terminated
    report/3                 the status report of rank 3, which it writes once a stop is requested
    alive_check_requested    set by a rank that wants to know whether all ranks are alive
    alive/3                  the answer of rank 3

Every method raises `torch.distributed.DistError` if the store cannot be reached.
"""

from __future__ import annotations

import json
import socket

from torch.distributed.distributed_c10d import PrefixStore, Store

from sas_megatron.fault_tolerance.final_report import RankStatus, StatusKind, StatusReport


class StatusStore:
    """Access of one rank to the status of all ranks, over one connection to the store.

    One connection serves one thread at a time, and a call may block for long: use `clone` for another thread.
    """

    def __init__(self, store: Store, *, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._connection = store
        self._store = PrefixStore("failure_watchdog", store)

    def clone(self) -> StatusStore:
        """Return access to the same status over a new connection."""
        connection = self._connection.clone()  # type: ignore[attr-defined]  # missing from torch's stubs
        return StatusStore(connection, rank=self.rank, world_size=self.world_size)

    def write_host(self) -> None:
        """Record the host of this rank."""
        self._store.set(f"host/{self.rank}", socket.gethostname())

    def write_step(self, step: int) -> None:
        """Record the last step that this rank has finished."""
        self._store.set(f"step/{self.rank}", str(step))

    def write_report(self, report: StatusReport) -> None:
        """Record the status report of this rank, or replace it."""
        self._store.set(f"report/{self.rank}", json.dumps([report.kind, report.text]))

    def request_stop(self) -> None:
        """Ask all ranks to report their status and end."""
        self._store.set("stop_requested", "")

    def is_stop_requested(self) -> bool:
        """Return whether any rank has called `request_stop`."""
        return self._store.check(["stop_requested"])

    def request_alive_check(self) -> None:
        """Ask all ranks to call `confirm_alive`."""
        self._store.set("alive_check_requested", "")

    def is_alive_check_requested(self) -> bool:
        """Return whether any rank has called `request_alive_check`."""
        return self._store.check(["alive_check_requested"])

    def confirm_alive(self) -> None:
        """Record that this rank is alive."""
        self._store.set(f"alive/{self.rank}", "")

    def are_all_alive(self) -> bool:
        """Return whether every rank has called `confirm_alive`."""
        return all(self._store.check([f"alive/{rank}"]) for rank in range(self.world_size))

    def increment(self, counter: str) -> int:
        """Add one to a counter that all ranks share, and return its new value."""
        return self._store.add(counter, 1)

    def count(self, counter: str) -> int:
        """Return the value of a shared counter; 0 if it was never incremented."""
        return self._store.add(counter, 0)

    def lowest_reporting_rank(self) -> int:
        """Return the lowest rank with a status report; this rank must have written its own."""
        return next(rank for rank in range(self.world_size) if self._store.check([f"report/{rank}"]))

    def read_statuses(self) -> list[RankStatus]:
        """Return the status of every rank, in rank order."""
        return [self._read_status(rank) for rank in range(self.world_size)]

    def _read_status(self, rank: int) -> RankStatus:
        step, report = self._read(f"step/{rank}"), self._read(f"report/{rank}")
        return RankStatus(
            rank,
            host=self._read(f"host/{rank}"),
            last_step=None if step is None else int(step),
            report=None if report is None else _parse_report(report),
        )

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None


def _parse_report(text: str) -> StatusReport:
    kind, line = json.loads(text)
    return StatusReport(StatusKind(kind), line)
