"""The last collectives that each rank set off, as torch's flight recorder keeps them, when a run hangs.

    flight_recorder/rank_00003.json     written by the rank at the roll call: gloo's entries or NCCL's
                    nccl_rank_3         written by NCCL's watchdog before it aborts a process (pickled)

An entry names operation, sizes, group and its number in the group: side by side, the ranks' last entries
show which of them went another way or no further.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch.distributed as dist

# A recorder that waits for a lock of what hangs must not keep the process from ending.
SECONDS_TO_WRITE = 2.0


class FlightRecorder:
    """Writes this rank's record into `folder`; torch keeps the last 2000 entries (TORCH_FR_BUFFER_SIZE)."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self.folder = folder
        self._path = folder / f"rank_{rank:05d}.json"

    def prepare(self, backend: str) -> None:
        """Lets NCCL's watchdog write beside it; before the process group is made."""
        if backend == "nccl":
            self.folder.mkdir(parents=True, exist_ok=True)
            os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", str(self.folder / "nccl_rank_"))

    def write(self) -> None:
        """Writes the record, if that can be done in a moment; what goes wrong is left out."""
        writer = threading.Thread(target=self._write, name="flight recorder", daemon=True)
        writer.start()
        writer.join(SECONDS_TO_WRITE)

    def _write(self) -> None:
        from torch._C import _distributed_c10d as c10d

        name = "_dump_nccl_trace_json" if dist.get_backend() == "nccl" else "_dump_fr_trace_json"
        dump = getattr(c10d, name, None)
        if dump is None:  # a private name of torch's
            return
        text: bytes = dump()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(text)
