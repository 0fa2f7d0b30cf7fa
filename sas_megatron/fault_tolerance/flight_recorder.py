"""Flight records: the last collectives that each rank started, written if a run hangs.

    flight_recorder/rank_00003.json    torch's record for gloo or NCCL, written by the failure watchdog
                    nccl_rank_3        written by NCCL's own watchdog before it aborts a process (pickled)

An entry holds the operation, the sizes, the group, and the sequence number in the group. The last entries of
all ranks show which rank started a different collective than the others, or none.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch.distributed as dist

# A recorder that waits for a lock of a hanging thread must not keep the process from ending.
SECONDS_TO_WRITE = 2.0


class FlightRecorder:
    """Writes the record of one rank; torch keeps the last 2000 collectives (TORCH_FR_BUFFER_SIZE).

    Args:
        folder: The directory for the records of all ranks.
        rank: This rank.
    """

    def __init__(self, folder: Path, *, rank: int) -> None:
        self.folder = folder
        self._path = folder / f"rank_{rank:05d}.json"

    def prepare(self, backend: str) -> None:
        """Let NCCL's watchdog write to the same directory; call it before the process group is created."""
        if backend == "nccl":
            self.folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(self.folder / "nccl_rank_"))

    def write(self) -> None:
        """Write the record, waiting at most `SECONDS_TO_WRITE`; a failure to write it is ignored."""
        writer = threading.Thread(target=self._write, name="flight recorder", daemon=True)
        writer.start()
        writer.join(SECONDS_TO_WRITE)

    def _write(self) -> None:
        from torch._C import _distributed_c10d as c10d

        name = "_dump_nccl_trace_json" if dist.get_backend() == "nccl" else "_dump_fr_trace_json"
        dump = getattr(c10d, name, None)
        if dump is None:  # the name is private to torch and may disappear
            return
        text: bytes = dump()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(text)
