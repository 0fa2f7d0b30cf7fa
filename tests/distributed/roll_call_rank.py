"""A rank of `test_roll_call`: enters the roll call, waits for a file to appear, then does as its act says.

Run as `python -m tests.distributed.roll_call_rank RANK WORLD_SIZE PORT ACT FILE`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from sas_megatron.config.errors import FieldError
from sas_megatron.fault_tolerance.failure_watchdog import FailureWatchdog


def main(rank: int, world_size: int, port: int, act: str, go: Path) -> None:
    """Print `ready` and the store's port inside the roll call, and `left` after it."""
    store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
    taken: list[int] = []

    def takes_signal(number: int) -> bool:
        taken.append(number)
        return act == "take" and len(taken) == 1

    with FailureWatchdog(
        store, rank=rank, world_size=world_size, timeout_minutes=1, takes_signal=takes_signal
    ) as roll_call:
        roll_call.finish_step(rank + 1)
        print("ready", store.port, flush=True)
        while not go.exists():
            time.sleep(0.02)
        if act == "user error":
            raise FieldError("data.prefixes", "x", "is missing", "give another")
        if act == "fail":
            raise ValueError("no good")
        while act == "hang":
            time.sleep(1.0)
    print("left", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
