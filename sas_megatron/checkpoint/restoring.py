"""Load checkpoints: find the newest intact checkpoint and restore it on any layout.

each rank verifies some of the files -> all ranks exchange the results -> each rank reads the blocks of its
shards
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from sas_megatron.checkpoint import manifest
from sas_megatron.checkpoint.manifest import DamagedCheckpoint, Manifest
from sas_megatron.checkpoint.rank_layout import (
    describe_layout,
    describe_layout_changes,
    read_random_states,
    set_random_states,
    shard_random_states,
)
from sas_megatron.checkpoint.sharded_tensors import group_by_name
from sas_megatron.checkpoint.tensor_reading import TensorReader
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.object_collectives import gather_from_ranks, raise_on_all_ranks, run_on_rank0
from sas_megatron.io.file_records import find_damage, select_files_of_rank


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files match its manifest."""

    path: Path
    manifest: Manifest
    progress: dict[str, Any]


def find_newest_complete(folder: Path, *, log: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest intact checkpoint in `folder`, or None if there are no checkpoints.

    Every rank must call this function.

    Args:
        folder: The `checkpoints` folder of the run.
        log: Called with a message for each damaged checkpoint that is skipped.

    Raises:
        FileProblem: All checkpoints are damaged, or this version does not read the format of the newest one.
    """
    paths: list[Path] = run_on_rank0(lambda: manifest.find_checkpoints(folder))
    for path in paths:
        try:
            return open_checkpoint(path)
        except DamagedCheckpoint as damage:
            log(f"{damage.path}: {damage.problem}; trying the previous checkpoint")
    if paths:
        raise FileProblem(
            folder,
            f"contains no intact checkpoint: {len(paths)} are damaged",
            "restore one from a copy, or remove all of them to start the run again from step 0",
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Verify a checkpoint. Every rank must call this function; all ranks together read each file once.

    Raises:
        DamagedCheckpoint: Files are damaged. The message names them and is the same on every rank.
        FileProblem: This version does not read the checkpoint's format.
    """
    found = raise_on_all_ranks(lambda: manifest.read_manifest(path))
    local_files = select_files_of_rank(found.files, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    damage_by_rank = gather_from_ranks(find_damage(path, local_files))
    manifest.raise_if_damaged(path, (line for lines in damage_by_rank for line in lines))
    progress = raise_on_all_ranks(lambda: manifest.read_progress(path, found))
    return Checkpoint(path, found, progress)


def restore_tensors(checkpoint: Checkpoint, shards: list[ShardedTensor]) -> None:
    """Read this rank's shards, in place, from a checkpoint of any layout. Every rank must call this function.

    Raises:
        FileProblem: The checkpoint lacks a tensor or has it in another shape; the same on every rank.
        DamagedCheckpoint: Files cannot be read; the same on every rank.
    """
    raise_on_all_ranks(lambda: _read_shards(checkpoint.path, shards))


def restore_random_states(checkpoint: Checkpoint, config: RunConfig, *, log: Callable[[str], None]) -> None:
    """Restore the random states if the layout is the same; otherwise keep the current ones and log this.

    Every rank must call this function.

    Raises:
        FileProblem: The random states cannot be read; the same on every rank.
    """
    changes = describe_layout_changes(checkpoint.manifest.layout, describe_layout(config))
    states = read_random_states()
    if changes:
        uses_dropout = config.model.hidden_dropout > 0 or config.attention.dropout > 0
        effect = (
            "dropout differs from that of an uninterrupted run"
            if uses_dropout
            else "this run uses no dropout, so its results do not change"
        )
        log(
            f"the layout differs from that of the checkpoint ({changes}): random states are not restored; "
            f"{effect}"
        )
        return
    restore_tensors(checkpoint, shard_random_states(states))
    set_random_states(states)


def _read_shards(folder: Path, shards: list[ShardedTensor]) -> None:
    """Read shards, in place, in this process.

    Raises:
        FileProblem: The checkpoint lacks a tensor, or has it in another shape.
        DamagedCheckpoint: Files cannot be read.
    """
    reader = TensorReader(folder)
    shapes = reader.shapes()
    for shard in shards:
        shape = shapes.get(shard.key)
        if shape != tuple(shard.global_shape):
            problem = "has no tensor" if shape is None else f"has shape {list(shape)} for"
            raise FileProblem(
                folder,
                f"{problem} {shard.key}, whose shape in this run is {list(shard.global_shape)}",
                "name the checkpoint of a run with the same model, attention and optimizer",
            )
    reader.read_into(group_by_name(shards))
