"""The status of every rank in the store of the rendezvous, where all ranks can read it.

    hosts                    a line with the rank and the host of each rank
    step/3                   the last step that rank 3 has finished; empty before it has started the first one
    stop_requested           set by the first rank that fails or is terminated
    reports                  lines with a rank and its status report, which it writes once a stop is requested
    alive_check_requested    set by a rank that wants to know whether all ranks are alive
    num_alive                the number of ranks that have answered

All ranks use the store at the same time when a run stops, and one process serves it. Therefore each method
makes a number of requests that does not depend on the number of ranks. Every method raises
`torch.distributed.DistError` if the store cannot be reached.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

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
        """Record the host of this rank, which has not finished any step; call it once."""
        self._store.set(f"step/{self.rank}", "")
        self._append("hosts", socket.gethostname())

    def write_step(self, step: int) -> None:
        """Record the last step that this rank has finished."""
        self._store.set(f"step/{self.rank}", str(step))

    def write_report(self, report: StatusReport) -> None:
        """Record the status report of this rank, or replace it."""
        self._append("reports", report.kind, report.text)

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
        """Record that this rank is alive; call it once."""
        self.increment("num_alive")

    def are_all_alive(self) -> bool:
        """Return whether every rank has called `confirm_alive`."""
        return self.count("num_alive") == self.world_size

    def increment(self, counter: str) -> int:
        """Add one to a counter that all ranks share, and return its new value."""
        return self._store.add(counter, 1)

    def count(self, counter: str) -> int:
        """Return the value of a shared counter; 0 if it was never incremented."""
        return self._store.add(counter, 0)

    def read_reports(self) -> dict[int, StatusReport]:
        """Return the report of every rank that has written one; this rank must have written its own."""
        return {
            rank: StatusReport(StatusKind(kind), text) for rank, kind, text in self._read_lines("reports")
        }

    def read_statuses(self, reports: Mapping[int, StatusReport]) -> list[RankStatus]:
        """Return the status of every rank, in rank order; this rank must have written its host.

        Args:
            reports: The result of `read_reports`.
        """
        hosts = dict(self._read_lines("hosts"))
        steps = dict(zip(hosts, self._store.multi_get([f"step/{rank}" for rank in hosts]), strict=True))
        return [
            RankStatus(
                rank,
                host=hosts.get(rank),
                last_step=int(steps[rank]) if steps.get(rank) else None,
                report=reports.get(rank),
            )
            for rank in range(self.world_size)
        ]

    def _append(self, key: str, *values: str) -> None:
        # PrefixStore inherits it, but torch's stubs lack it.
        self._store.append(key, json.dumps([self.rank, *values]) + "\n")  # type: ignore[attr-defined]

    def _read_lines(self, key: str) -> list[list[Any]]:
        return [json.loads(line) for line in self._store.get(key).splitlines()]
