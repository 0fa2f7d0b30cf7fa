"""Many ranks of `test_many_ranks` in one process, a thread each: they stop, then report an error of all.

usage: python -m tests.fault_tolerance.many_ranks FIRST_RANK NUM_RANKS WORLD_SIZE PORT FILE
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from torch.distributed import TCPStore

from sas_megatron.fault_tolerance import failure_watchdog
from sas_megatron.fault_tolerance.failure_watchdog import FailureWatchdog
from sas_megatron.fault_tolerance.final_report import StatusKind, StatusReport
from sas_megatron.fault_tolerance.status_store import StatusStore


def stop_and_report(rank: int, world_size: int, store: TCPStore) -> None:
    """Check that all ranks are alive, as after a signal, then end the run as after an error."""
    status = StatusStore(store, rank=rank, world_size=world_size)
    status.request_alive_check()
    assert status.is_alive_check_requested()
    status.confirm_alive()
    while not status.are_all_alive():
        time.sleep(failure_watchdog.COUNTER_POLL_SECONDS)
    watchdog = FailureWatchdog(store, rank=rank, world_size=world_size, timeout_minutes=1)
    watchdog._thread_status = status
    watchdog._error_report = StatusReport(StatusKind.FAILED, "ValueError: no good")
    watchdog._end_run(StatusReport(StatusKind.RUNNING, "a line"))


def main(first_rank: int, num_ranks: int, world_size: int, port: int, start_file: Path) -> None:
    """Print `connected`; after the file exists, print the monotonic time at which all have ended."""
    failure_watchdog._end_process = lambda: None  # type: ignore[assignment,return-value]
    ranks = range(first_rank, first_rank + num_ranks)
    stores = {rank: TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False) for rank in ranks}
    for rank, store in stores.items():
        status = StatusStore(store, rank=rank, world_size=world_size)
        status.write_host()
        status.write_step(3)
    print("connected", flush=True)
    while not start_file.exists():
        time.sleep(0.005)
    threads = [
        threading.Thread(target=stop_and_report, args=(rank, world_size, store))
        for rank, store in stores.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(time.monotonic(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
