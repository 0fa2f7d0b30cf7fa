"""Speed of a save: the time for which it blocks training, what its checksums add, and its rate.

The blocked time is compared with a copy in memory, and the rate with `dd`.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor

from sas_megatron.benchmarks.timing import time_by_wall_clock
from sas_megatron.checkpoint.saving import CheckpointSaver
from sas_megatron.checkpoint.sharded_tensors import shard_by_rank
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.topology import Topology
from sas_megatron.io import hashed_file

NUM_TENSORS = 16


def measure_checkpointing(
    folder: Path, config: RunConfig, topology: Topology, *, gigabytes: float, repeats: int
) -> dict[str, Any]:
    """Save random tensors from one process, in alternation with a copy and with `dd` of the same size.

    Args:
        folder: A folder on the disk to measure. All files written there are removed.
        config: Any run of one process; its `checkpoint.asynchronous` is ignored.
        topology: A world of one process.
        gigabytes: Size of the tensors in 10⁹ bytes.
        repeats: Number of rounds, each of which takes every measurement once.

    Returns:
        Median seconds by measurement, and the median ratios within rounds: the time for which an
        asynchronous save blocks over the time of one copy in memory, the part of a synchronous save by which
        it takes longer than one without checksums, and the rate of a save over the rate of `dd conv=fsync`.
    """
    elements = round(gigabytes * 1e9 / 4 / NUM_TENSORS)
    tensors = [torch.rand(elements, device=topology.device) for _ in range(NUM_TENSORS)]
    num_bytes = 4 * elements * NUM_TENSORS
    shards = [shard_by_rank(f"tensor_{i}", tensor, rank=0, num_ranks=1) for i, tensor in enumerate(tensors)]
    savers = {mode: _saver(folder / mode, config, topology, mode) for mode in ("asynchronous", "synchronous")}
    rounds = []
    for step in range(1, repeats + 1):
        seconds = {
            "copy": time_by_wall_clock(lambda: [tensor.to("cpu", copy=True) for tensor in tensors]),
            "blocked": time_by_wall_clock(functools.partial(_save, savers["asynchronous"], step, shards)),
        }
        savers["asynchronous"].finish()
        # The second of two saves may have to wait for the disk, so they take turns.
        for name in ("save", "unhashed") if step % 2 else ("unhashed", "save"):
            with _without_checksums() if name == "unhashed" else contextlib.nullcontext():
                seconds[name] = time_by_wall_clock(
                    functools.partial(_save, savers["synchronous"], step, shards)
                )
            shutil.rmtree(folder / "synchronous")
        seconds["dd"] = time_by_wall_clock(lambda: _write_with_dd(folder / "zeros", num_bytes))
        rounds.append(seconds)
        shutil.rmtree(folder / "asynchronous")
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return {
        "bytes": num_bytes,
        "seconds": medians,
        "blocked_over_copy": statistics.median(each["blocked"] / each["copy"] for each in rounds),
        "hashing_exposed": statistics.median(
            (each["save"] - each["unhashed"]) / each["save"] for each in rounds
        ),
        "save_rate_over_dd": statistics.median(each["dd"] / each["save"] for each in rounds),
        "save_bytes_per_second": num_bytes / medians["save"],
        "repeats": repeats,
    }


class _NoDigest:
    """Stands in for SHA-256."""

    def update(self, data: bytes | memoryview) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """Return a checksum that does not depend on the data."""
        return "0" * 64


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Write checkpoints in a `with` block whose files of tensors are not hashed."""
    original = hashed_file.new_digest
    hashed_file.new_digest = _NoDigest  # type: ignore[assignment]
    try:
        yield
    finally:
        hashed_file.new_digest = original


def _saver(folder: Path, config: RunConfig, topology: Topology, mode: str) -> CheckpointSaver:
    checkpoint = config.checkpoint.model_copy(update={"asynchronous": mode == "asynchronous"})
    return CheckpointSaver(folder, config.model_copy(update={"checkpoint": checkpoint}), topology)


def _save(saver: CheckpointSaver, step: int, shards: list[ShardedTensor]) -> None:
    progress = {"counts": {"step": step}, "engine": {"num_updates": step}, "schedule_steps": step}
    saver.save(step, shards=shards, progress=progress, write_files=lambda folder: None)


def _write_with_dd(path: Path, num_bytes: int) -> None:
    block = 2**24
    command = ["dd", "if=/dev/zero", f"of={path}", f"bs={block}", f"count={num_bytes // block}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    path.unlink()
