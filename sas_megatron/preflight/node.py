"""One node: limits, shared memory, disk, environment. No torch."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from sas_megatron.preflight.finding import Finding, failure, fine, warning

MIB, GIB = 2**20, 2**30
# Counted with gloo and tensor=2, all imports and a checkpoint included: 96 files at once with one rank, 115
# with two, 129 with four.
FILES_OF_A_RANK, FILES_PER_PEER = 110, 8
COMFORTABLE_FILES = 1024
# NCCL's buffers between two GPUs of a node; Docker gives 64 MiB where nobody asks for more.
SHARED_MEMORY_FOR_NCCL_BYTES = 256 * MIB
PROBE_BYTES = 32 * MIB
SLOW_DISK_BYTES_PER_SECOND = 20 * MIB


def check_open_files(*, world_size: int) -> Finding:
    """The limit on open files against what a rank of that world needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_OF_A_RANK + FILES_PER_PEER * (world_size - 1)
    observed = f"at most {soft} (hard limit {hard})"
    remedy = f"ulimit -n {max(needed, COMFORTABLE_FILES)} before the start; in a container --ulimit nofile=…"
    if soft < needed:
        return failure("open files", f"{observed}; a rank needs about {needed}", remedy)
    if soft < COMFORTABLE_FILES:
        return warning("open files", observed, remedy)
    return fine("open files", observed)


def check_shared_memory(*, uses_gpus: bool, directory: Path = Path("/dev/shm")) -> Finding:
    """Whether processes of a node can exchange through shared memory."""
    remedy = "in a container, --ipc=host or --shm-size=16g (launch/docker_run.sh does); else mount -o remount"
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        return failure("shared memory", f"{directory} is not there or not writable", remedy)
    free = shutil.disk_usage(directory).free
    if free < SHARED_MEMORY_FOR_NCCL_BYTES:
        observed = f"{free / MIB:.0f} MiB free in {directory}"
        return (failure if uses_gpus else warning)("shared memory", observed, remedy)
    return fine("shared memory", f"{free / GIB:.1f} GiB free")


def existing_part(path: Path) -> Path:
    """`path`, or the nearest of the folders above it that is there."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def check_run_directory(directory: Path, *, checkpoint_bytes: int | None = None) -> Iterator[Finding]:
    """Writability, speed and free space at a run directory, which may not exist yet.

    Args:
        directory: Where the run would write.
        checkpoint_bytes: Of one checkpoint, where the model is known.
    """
    existing = existing_part(directory)
    elsewhere = "choose another logging.run_directory"
    if not existing.is_dir():
        yield failure("run directory", f"{existing} is a file", elsewhere)
        return
    free = shutil.disk_usage(existing).free
    yield _check_space(existing, free, checkpoint_bytes)
    probe = existing / f".preflight-{uuid.uuid4().hex}"
    size = min(PROBE_BYTES, free // 2)
    try:
        begun = time.perf_counter()
        with probe.open("wb") as file:
            file.write(os.urandom(MIB) * (size // MIB) or b"written")
            file.flush()
            os.fsync(file.fileno())
        speed = size / (time.perf_counter() - begun)
    except OSError as error:
        yield failure("run directory", f"{existing} cannot be written: {error.strerror}", elsewhere)
        return
    finally:
        with contextlib.suppress(OSError):  # which a read-only file system raises, file or no file
            probe.unlink()
    observed = f"{existing} takes {speed / MIB:.0f} MiB/s"
    if size == PROBE_BYTES and speed < SLOW_DISK_BYTES_PER_SECOND:
        yield warning("run directory", observed, "expect to wait for checkpoints, or choose a faster disk")
    else:
        yield fine("run directory", observed)


def _check_space(directory: Path, free: int, checkpoint_bytes: int | None) -> Finding:
    observed = f"{free / GIB:.1f} GiB free at {directory}"
    remedy = "make room there, or choose another logging.run_directory"
    if checkpoint_bytes is not None and free < checkpoint_bytes:
        return failure(
            "disk space", f"{observed}; one checkpoint takes {checkpoint_bytes / GIB:.2f} GiB", remedy
        )
    if free < MIB:
        return failure("disk space", observed, remedy)
    # The newest is only dropped once the next is whole.
    if free < max(GIB, 3 * (checkpoint_bytes or 0)):
        return warning("disk space", observed, remedy)
    return fine("disk space", observed)


def check_environment(environment: Mapping[str, str], *, uses_gpus: bool) -> Iterator[Finding]:
    """Variables that change how ranks compute or meet."""
    found = []
    if uses_gpus and environment.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        found.append(
            warning(
                "environment",
                f"CUDA_DEVICE_MAX_CONNECTIONS={environment.get('CUDA_DEVICE_MAX_CONNECTIONS', '')}",
                "set it to 1 before Python starts, for Megatron-core's overlap (the scripts in launch/ do)",
            )
        )
    if "OMP_NUM_THREADS" not in environment and int(environment.get("WORLD_SIZE", "1")) > 1:
        found.append(
            warning(
                "environment",
                "OMP_NUM_THREADS is not set: each rank of a node takes all its processors",
                "set it to processors divided by ranks of a node (the scripts in launch/ set 1)",
            )
        )
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE"):
        if uses_gpus and environment.get(name, "0") != "0":
            found.append(
                warning("environment", f"{name}={environment[name]}", f"unset {name}: it slows NCCL")
            )
    yield from found or [fine("environment", "nothing that slows or misleads")]
