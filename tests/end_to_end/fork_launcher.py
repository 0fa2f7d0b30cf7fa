"""A launcher that forks the ranks of one node and handles them as torchrun does.

usage: tests.end_to_end.fork_launcher PIDS_FILE NUM_RANKS MODULE [ARGUMENT ...], run by a `ForkedCommand`

It hosts the store of the ranks, forwards signals to them, and ends them all and exits with status 1 if
one fails. The ids of the ranks' processes are written to PIDS_FILE.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECONDS_TO_END = 10.0  # between SIGTERM and SIGKILL; torchrun waits 30 s


class Ranks:
    """The processes of the ranks; each runs `module` as `__main__`."""

    def __init__(self, num_ranks: int, module: str, arguments: list[str]) -> None:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.pids: list[int] = []
        self._statuses: dict[int, int] = {}
        for rank in range(num_ranks):
            if (pid := os.fork()) == 0:
                self._become(rank, num_ranks, module, arguments)
            self.pids.append(pid)

    def host_store(self) -> object:
        """Return the store that the ranks connect to; it serves them until it is garbage-collected."""
        from torch.distributed import TCPStore

        host, port = self._listener.getsockname()
        return TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=self._listener.detach()
        )

    def signal(self, number: int, _frame: FrameType | None = None) -> None:
        """Send a signal to the processes that have not ended."""
        for pid in self.pids:
            if pid not in self._statuses:
                os.kill(pid, number)

    def wait(self) -> int:
        """Wait for all processes and return 0 if all exited with 0.

        If one exits with another status, end the others and return 1.
        """
        deadline = float("inf")
        while len(self._statuses) < len(self.pids):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                time.sleep(0.02)
            elif status := self._record(pid, os.waitstatus_to_exitcode(status)):
                print(f"rank {self.pids.index(pid)}: exitcode : {status}", file=sys.stderr, flush=True)
                if deadline == float("inf"):
                    deadline = time.monotonic() + SECONDS_TO_END
                    self.signal(signal.SIGTERM)
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
        return int(any(self._statuses.values()))

    def _record(self, pid: int, status: int) -> int:
        self._statuses[pid] = status
        return status

    def _become(self, rank: int, num_ranks: int, module: str, arguments: list[str]) -> None:
        host, port = self._listener.getsockname()
        self._listener.close()
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_ranks),
            MASTER_ADDR=host,
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="forked",
            TORCHELASTIC_RESTART_COUNT="0",
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        sys.exit(0)


def main(pids_file: str, num_ranks: str, module: str, *arguments: str) -> int:
    """Run the ranks until all have ended; return the exit status."""
    ranks = Ranks(int(num_ranks), module, list(arguments))
    for number in SIGNALS:
        signal.signal(number, ranks.signal)
    Path(pids_file).write_text(json.dumps(ranks.pids))
    store = ranks.host_store()
    status = ranks.wait()
    del store
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
