"""A rank of `test_failure_watchdog`: enters the watchdog, waits for a file, acts out a behaviour.

usage: python -m tests.fault_tolerance.watchdog_rank RANK WORLD_SIZE PORT BEHAVIOUR FILE
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from sas_megatron.config.errors import FieldError
from sas_megatron.fault_tolerance.failure_watchdog import FailureWatchdog


def main(rank: int, world_size: int, port: int, behaviour: str, start_file: Path) -> None:
    """Print `ready` and the port of the store inside the watchdog, and `left` after it."""
    store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    received: list[int] = []

    def handles_signal(number: int) -> bool:
        received.append(number)
        return behaviour == "handle a signal" and len(received) == 1

    with FailureWatchdog(
        store, rank=rank, world_size=world_size, timeout_minutes=1, handles_signal=handles_signal
    ) as watchdog:
        watchdog.finish_step(rank + 1)
        print("ready", store.port, flush=True)
        while not start_file.exists():
            time.sleep(0.02)
        if behaviour == "user error":
            raise FieldError("data.prefixes", "x", "is missing", "give another")
        if behaviour == "fail":
            raise ValueError("no good")
        while behaviour == "hang":
            time.sleep(1.0)
    print("left", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
