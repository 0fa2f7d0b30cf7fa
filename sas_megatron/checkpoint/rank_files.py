"""Checkpoints of one file a rank: exact to resume on the same layout, and on no other.

    checkpoints/iter_0000100/rank_00000.pt ...   weights, optimizer, schedule, random states, progress
                             manifest.json       written last

A checkpoint is written into `iter_0000100.partial` and renamed when every rank has finished, so one
that has its final name is complete.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from sas_megatron.config.errors import FileProblem
from sas_megatron.parallel.topology import Topology

SCHEMA_VERSION = 2
GO_BACK = "remove that checkpoint to go on from the one before"
_NAME = re.compile(r"iter_(\d{7,})")


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    capture: Callable[[Path], dict[str, Any]],
    topology: Topology,
) -> Path:
    """Writes a checkpoint of all ranks; every rank must call it.

    Args:
        folder: The run's `checkpoints` folder.
        step: Steps finished.
        capture: Gives this rank's state: tensors, numbers, strings and plain containers of them. It is
            handed the checkpoint's folder, and may write more into it.
        topology: This rank's place.
    """
    final = folder / f"iter_{step:07d}"
    partial = final.with_suffix(".partial")
    if topology.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = capture(partial)
    with (partial / _rank_file(topology.rank)).open("wb") as file:
        torch.save({**state, "random": _random_states()}, file)
        file.flush()
        os.fsync(file.fileno())
    dist.barrier()
    if topology.is_first:
        manifest = {"schema": SCHEMA_VERSION, "step": step, "layout": _layout(topology)}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier()
    return final


def find_newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    if not folder.is_dir():
        return None
    complete = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return max(complete, key=lambda path: int(path.name.split("_")[1]), default=None)


def load_checkpoint(path: Path, topology: Topology) -> dict[str, Any]:
    """This rank's state, random states already set; every rank must call it.

    Raises:
        FileProblem: the checkpoint is damaged, of a newer format, or of another layout; the same on
            every rank, whichever rank's file is at fault.
    """
    state, problem = None, None
    try:
        _check_manifest(path, topology)
        state = _read_rank_file(path / _rank_file(topology.rank), topology.device)
    except FileProblem as error:
        problem = error
    problems: list[FileProblem | None] = [None] * topology.world_size
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise found
    assert state is not None, "no rank found a problem"
    _set_random_states(state.pop("random"))
    return state


def _check_manifest(path: Path, topology: Topology) -> None:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        schema, layout = manifest["schema"], manifest["layout"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileProblem(path, f"has no readable manifest ({error!r})", GO_BACK) from None
    if schema > SCHEMA_VERSION:
        raise FileProblem(path, f"has format {schema}, newer than {SCHEMA_VERSION}", "update the package")
    if schema < SCHEMA_VERSION:
        raise FileProblem(
            path, f"has format {schema}, older than {SCHEMA_VERSION}", "go on with the version that wrote it"
        )
    if layout != _layout(topology):
        raise FileProblem(
            path,
            f"was saved by the layout {layout}, this run has {_layout(topology)}",
            "resume with the same number of ranks and parallel.* settings",
        )


def _read_rank_file(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        # Weights only: reading a checkpoint runs no code from it.
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileProblem(path, f"is damaged ({reason})", GO_BACK) from None
    return state


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


def _layout(topology: Topology) -> dict[str, int]:
    return {
        "world_size": topology.world_size,
        "tensor": topology.tensor_group.size(),
        "context": topology.context_group.size(),
        "pipeline": topology.pipeline_group.size(),
        "data": topology.data_size,
    }


def _random_states() -> dict[str, Any]:
    return {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    # Generator states live on the CPU wherever the checkpoint was mapped to.
    torch.set_rng_state(states["cpu"].cpu())
    torch.cuda.set_rng_state(states["device"].cpu())
    get_cuda_rng_tracker().set_states({name: state.cpu() for name, state in states["tracker"].items()})
