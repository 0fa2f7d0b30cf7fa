"""Tensors in torch's distributed format, written by this process and its own threads.

Megatron-core's own writer for this format spawns a process that imports the entry script again, and
forks more. The files are the same: Megatron-core's `dist_checkpointing.load_plain_tensors` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from sas_megatron.checkpoint.sharded_tensors import by_name

# What Megatron-core reads beside them: the name of the format, and what is common to all ranks (nothing).
FORMAT, COMMON = "metadata.json", "common.pt"


class TensorWriter:
    """Writes one checkpoint's tensors, each part of a tensor by one of the ranks that hold it.

    TensorWriter(…) on all ranks -> write() on each, in any thread -> finish(…) on rank 0
    """

    def __init__(self, folder: Path, shards: Iterable[ShardedTensor]) -> None:
        """Agrees with the other ranks on who writes what; the folder must exist."""
        is_first = dist.get_rank() == 0
        self._folder = folder
        self._planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
        self._metadata: Metadata | None = None
        self._planner.set_up_planner(by_name(shards), None, is_first)
        self._writer.set_up_storage_writer(is_first)
        local = self._writer.prepare_local_plan(self._planner.create_local_plan())
        plans: list[SavePlan] = [local] * dist.get_world_size()
        dist.gather_object(local, plans if is_first else None)
        if is_first:
            plans, self._metadata = self._planner.create_global_plan(plans)
            plans = self._writer.prepare_global_plan(plans)
        mine: list[SavePlan] = [local]
        dist.scatter_object_list(mine, plans if is_first else None)
        self._plan = self._planner.finish_plan(mine[0])

    def copy(self) -> None:
        """Copies what this rank is to write, so that training may go on while it does."""
        self._planner.copy()

    def write(self) -> list[WriteResult]:
        """Writes this rank's share into a file, one tensor held at a time, and waits until it is on disk.

        Torch's own writer keeps all copies that it made, of views and of a GPU's tensors, until the file
        is complete (2.13).
        """
        if not self._plan.items:
            return []
        name = f"{self._plan.storage_data.prefix}0.distcp"
        results = []
        with (self._folder / name).open("wb") as file:
            for item in self._plan.items:
                begin = file.tell()
                torch.save(_alone(self._planner.lookup_object(item.index)), file)
                place = _StorageInfo(name, begin, file.tell() - begin)
                results.append(WriteResult(item.index, place.length, place))
            file.flush()
            os.fsync(file.fileno())
        return results

    def finish(self, results: list[list[WriteResult]]) -> None:
        """Writes where everything lies, from what `write` returned on each rank."""
        assert self._metadata is not None, "rank 0 does this"
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        torch.save({}, self._folder / COMMON)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, with no more memory behind it than its own: torch.save writes all that there is."""
    own = tensor.detach().cpu()
    return own if own.untyped_storage().size() == own.nbytes else own.clone()


def files_of(results: list[WriteResult]) -> set[str]:
    """Names of the files that a rank has written."""
    return {result.storage_data.relative_path for result in results}


class _SavePlanner(DefaultSavePlanner):
    """The default, with copies of this rank's share on demand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._copies: dict[MetadataIndex, torch.Tensor] = {}

    def copy(self) -> None:
        for item in self.plan.items:
            self._copies[item.index] = self.lookup_object(item.index).detach().to("cpu", copy=True)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The copy, if there is one."""
        copy = self._copies.get(index)
        return super().lookup_object(index) if copy is None else copy
