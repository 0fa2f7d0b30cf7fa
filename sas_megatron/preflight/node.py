"""Checks of one node: limits, shared memory, disk, environment variables and GPUs.

Importing this module does not import torch, which opens many files and takes seconds; only `check_gpus` does.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from sas_megatron.preflight.finding import Finding, failure, fine, warning

MIB, GIB = 2**20, 2**30
# Open files of a rank, measured with gloo and tensor=2 including all imports and a checkpoint: 96 with one
# rank, 115 with two, 129 with four.
FILES_PER_RANK, FILES_PER_PEER = 110, 8
RECOMMENDED_FILES = 1024
# NCCL's buffers between two GPUs of a node need this size. The default of Docker is 64 MiB.
NCCL_SHARED_MEMORY_BYTES = 256 * MIB
PROBE_BYTES = 32 * MIB
SLOW_DISK_BYTES_PER_SECOND = 20 * MIB
# A GPU with less memory in use counts as idle: drivers and display servers hold some.
IDLE_GPU_BYTES = 1024 * MIB
GPU_QUERY = "index,name,driver_version,memory.used,ecc.errors.uncorrected.volatile.total"


def check_open_files(*, world_size: int) -> Finding:
    """Compare the limit on open files with the number that one rank of `world_size` needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_PER_RANK + FILES_PER_PEER * (world_size - 1)
    observed = f"at most {soft} (hard limit {hard})"
    remedy = (
        f"run ulimit -n {max(needed, RECOMMENDED_FILES)} before the start; in a container --ulimit nofile=…"
    )
    if soft < needed:
        return failure("open files", f"{observed}; a rank needs about {needed}", remedy)
    if soft < RECOMMENDED_FILES:
        return warning("open files", observed, remedy)
    return fine("open files", observed)


def check_shared_memory(*, uses_gpus: bool, directory: Path = Path("/dev/shm")) -> Finding:
    """Check that processes of a node can exchange data through shared memory in `directory`."""
    remedy = "in a container use --ipc=host (launch/docker_run.sh does) or --shm-size=16g; else remount it"
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        return failure("shared memory", f"{directory} does not exist or is not writable", remedy)
    free = shutil.disk_usage(directory).free
    if free < NCCL_SHARED_MEMORY_BYTES:
        observed = f"{free / MIB:.0f} MiB free in {directory}"
        return (failure if uses_gpus else warning)("shared memory", observed, remedy)
    return fine("shared memory", f"{free / GIB:.1f} GiB free")


def existing_part(path: Path) -> Path:
    """Return `path`, or its nearest parent directory that exists."""
    return next(candidate for candidate in (path, *path.absolute().parents) if candidate.exists())


def check_run_directory(directory: Path, *, checkpoint_bytes: int | None = None) -> Iterator[Finding]:
    """Check that a run directory, which may not exist yet, is writable, fast, and has free space.

    Args:
        directory: The directory that the run would write to.
        checkpoint_bytes: The size of one checkpoint; None if the model is not known.
    """
    existing = existing_part(directory)
    remedy = "set another logging.run_directory"
    if not existing.is_dir():
        yield failure("run directory", f"{existing} is a file", remedy)
        return
    free = shutil.disk_usage(existing).free
    yield _check_space(existing, free, checkpoint_bytes)
    probe = existing / f".preflight-{uuid.uuid4().hex}"
    size = min(PROBE_BYTES, free // 2)
    try:
        started = time.perf_counter()
        with probe.open("wb") as file:
            file.write(os.urandom(MIB) * (size // MIB) or b"written")
            file.flush()
            os.fsync(file.fileno())
        speed = size / (time.perf_counter() - started)
    except OSError as error:
        yield failure("run directory", f"{existing} cannot be written: {error.strerror}", remedy)
        return
    finally:
        with contextlib.suppress(
            OSError
        ):  # a read-only file system raises it even if the file does not exist
            probe.unlink()
    observed = f"{existing} can be written at {speed / MIB:.0f} MiB/s"
    if size == PROBE_BYTES and speed < SLOW_DISK_BYTES_PER_SECOND:
        yield warning("run directory", observed, "use a faster disk, or expect slow checkpoints")
    else:
        yield fine("run directory", observed)


def _check_space(directory: Path, free: int, checkpoint_bytes: int | None) -> Finding:
    observed = f"{free / GIB:.1f} GiB free at {directory}"
    remedy = "free space there, or set another logging.run_directory"
    if checkpoint_bytes is not None and free < checkpoint_bytes:
        return failure(
            "disk space", f"{observed}; one checkpoint takes {checkpoint_bytes / GIB:.2f} GiB", remedy
        )
    if free < MIB:
        return failure("disk space", observed, remedy)
    # An old checkpoint is deleted only after the next one is complete.
    if free < max(GIB, 3 * (checkpoint_bytes or 0)):
        return warning("disk space", observed, remedy)
    return fine("disk space", observed)


def check_environment(
    environment: Mapping[str, str], *, engine: str | None, uses_gpus: bool
) -> Iterator[Finding]:
    """Check environment variables that slow down training.

    Args:
        environment: The variables.
        engine: `training.engine` of the run; None without a config.
        uses_gpus: Whether the node has GPUs.
    """
    found = []
    connections = environment.get("CUDA_DEVICE_MAX_CONNECTIONS")
    # If it is unset, training sets it (platform/gpu_settings.py).
    if uses_gpus and connections is not None and engine is not None:
        if engine == "megatron" and connections != "1":
            remedy = "unset it, or set it to 1: Megatron-core's overlap needs a single hardware queue"
        elif engine == "deepspeed" and connections == "1":
            remedy = "unset it: a single hardware queue serializes DeepSpeed's overlap"
        else:
            remedy = None
        if remedy is not None:
            found.append(warning("environment", f"CUDA_DEVICE_MAX_CONNECTIONS={connections}", remedy))
    if "OMP_NUM_THREADS" not in environment and int(environment.get("WORLD_SIZE", "1")) > 1:
        found.append(
            warning(
                "environment",
                "OMP_NUM_THREADS is not set, so each rank uses all processors of its node",
                "set it to the processors per rank of the node (the scripts in launch/ set 1)",
            )
        )
    for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE", "NCCL_SHM_DISABLE"):
        if uses_gpus and environment.get(name, "0") != "0":
            found.append(
                warning("environment", f"{name}={environment[name]}", f"unset {name}, which slows NCCL down")
            )
    yield from found or [fine("environment", "no variable that slows training down")]


def check_gpus() -> Iterator[Finding]:
    """Check that torch can use the GPUs that nvidia-smi lists, their memory use, and their ECC errors."""
    import torch

    listed = _list_gpus()
    if not listed and not torch.cuda.is_available():
        yield fine("GPUs", "no GPUs; training runs on the CPU with gloo")
        return
    if not torch.cuda.is_available():
        yield failure(
            "GPUs",
            f"the driver {listed[0][2]} lists {len(listed)}, but torch {torch.__version__} cannot use them",
            "install torch for a CUDA version that the driver supports (see nvidia-smi), or a newer driver",
        )
        return
    names = sorted({torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())})
    driver = listed[0][2] if listed else "unknown"
    yield fine("GPUs", f"{torch.cuda.device_count()} × {', '.join(names)}, driver {driver}")
    for index, _, _, used, errors in listed:
        if used.isdigit() and int(used) * MIB > IDLE_GPU_BYTES:
            yield warning(
                "GPUs",
                f"GPU {index} has {used} MiB in use already",
                f"end the processes that use it: nvidia-smi -i {index} lists them",
            )
        if errors.isdigit() and int(errors) > 0:
            yield failure(
                "GPUs",
                f"GPU {index} has had {errors} uncorrected memory errors since it was started",
                "drain the node and reset or replace that GPU",
            )


def _list_gpus() -> list[list[str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits"]
    try:
        completed = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return []  # nvidia-smi is installed, but no driver is loaded
    return [[field.strip() for field in line.split(",")] for line in completed.stdout.splitlines() if line]
