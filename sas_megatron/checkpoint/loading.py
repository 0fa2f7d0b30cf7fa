"""Reading checkpoints: the newest that is whole, by any layout.

verify (each rank some of the files) -> all ranks know -> each rank reads the boxes it needs
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from sas_megatron.checkpoint import manifest
from sas_megatron.checkpoint.layout import describe_layout, name_differences
from sas_megatron.checkpoint.manifest import DamagedCheckpoint, Manifest
from sas_megatron.checkpoint.random_states import read_random_states, set_random_states, shard_random_states
from sas_megatron.checkpoint.sharded_tensors import by_name
from sas_megatron.checkpoint.tensor_reading import TensorReader
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.object_collectives import gather_from_ranks, raise_on_all_ranks, run_on_rank0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what was written."""

    path: Path
    manifest: Manifest
    progress: dict[str, Any]


def find_newest_complete(folder: Path, *, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint in `folder` that is undamaged; None if there is none at all.

    Every rank must call it. What is damaged it says, and goes on to the one before.

    Raises:
        FileProblem: all are damaged, or the newest is of another version.
    """
    paths: list[Path] = run_on_rank0(lambda: manifest.find_checkpoints(folder))
    for path in paths:
        try:
            return open_checkpoint(path)
        except DamagedCheckpoint as damage:
            say(f"{damage.path}: {damage.problem}; going back to the checkpoint before")
    if paths:
        raise FileProblem(
            folder,
            f"holds no checkpoint that is whole: {len(paths)} are damaged",
            "put one back from a copy, or remove them all to begin anew",
        )
    return None


def open_checkpoint(path: Path) -> Checkpoint:
    """Verifies a checkpoint, the ranks reading each file once between them; every rank must call it.

    Raises:
        DamagedCheckpoint: names the damaged files; the same on every rank.
        FileProblem: its format is of another version.
    """
    found = raise_on_all_ranks(lambda: manifest.read_manifest(path))
    share = manifest.find_own_share(found.files, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    by_rank = gather_from_ranks(manifest.find_damage(path, share))
    manifest.refuse_damage(path, (line for lines in by_rank for line in lines))
    progress = raise_on_all_ranks(lambda: json.loads((path / manifest.PROGRESS).read_text(encoding="utf-8")))
    return Checkpoint(path, found, progress)


def restore_tensors(checkpoint: Checkpoint, shards: list[ShardedTensor]) -> None:
    """Fills this rank's tensors, in place, from a checkpoint of any layout; every rank must call it."""
    raise_on_all_ranks(lambda: _read_tensors(checkpoint.path, shards))


def restore_random_states(checkpoint: Checkpoint, config: RunConfig, *, say: Callable[[str], None]) -> None:
    """Random states as they were, if the layout is the same; otherwise says that they are not.

    Every rank must call it.
    """
    changes = name_differences(checkpoint.manifest.layout, describe_layout(config))
    states = read_random_states()
    if changes:
        drops = config.model.hidden_dropout > 0 or config.attention.dropout > 0
        effect = "dropout draws differ from what they would have been" if drops else "there is no dropout"
        say(f"another layout than the checkpoint's ({changes}): random states begin anew; {effect}")
        return
    restore_tensors(checkpoint, shard_random_states(states))
    set_random_states(states)


def _read_tensors(folder: Path, shards: list[ShardedTensor]) -> None:
    """Fills the tensors of `shards`, in place, from a checkpoint that any layout has written.

    Raises:
        FileProblem: it lacks one of them, or has another shape.
        DamagedCheckpoint: the files cannot be read.
    """
    reader = TensorReader(folder)
    sizes = reader.sizes()
    for shard in shards:
        size = sizes.get(shard.key)
        if size != tuple(shard.global_shape):
            has = "no tensor" if size is None else f"another shape, {list(size)}, of"
            raise FileProblem(
                folder,
                f"has {has} {shard.key}, which is {list(shard.global_shape)} in this run",
                "give the checkpoint of a run with the same model, attention and optimizer",
            )
    reader.fill(by_name(shards))
