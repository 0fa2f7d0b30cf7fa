"""Write tensors in torch's distributed format, in this process and its threads.

Megatron-core's writer for this format starts processes: it spawns one that imports the entry script again,
and forks others. The files have the same format: Megatron-core's `dist_checkpointing.load_plain_tensors`
reads them.
"""

from __future__ import annotations

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
from typing_extensions import override

from sas_megatron.checkpoint.host_copies import HostCopies
from sas_megatron.checkpoint.sharded_tensors import group_by_name
from sas_megatron.io.file_records import FileRecord
from sas_megatron.io.hashed_file import HashedFile

# Files that Megatron-core also reads: the name of the format, and the state common to all ranks (empty).
FORMAT, COMMON = "metadata.json", "common.pt"


class TensorWriter:
    """Writes the tensors of one checkpoint. One of the ranks that hold a shard writes it.

    TensorWriter(…) on all ranks -> write() on each rank, in any thread -> finish(…) on rank 0
    """

    def __init__(self, folder: Path, shards: Iterable[ShardedTensor]) -> None:
        """Plan with the other ranks which rank writes which shard.

        Args:
            folder: Existing folder of the checkpoint.
            shards: The local shards of this rank.
        """
        is_first = dist.get_rank() == 0
        self._folder = folder
        self._host_copies = HostCopies()
        self._planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._writer = FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
        self._metadata: Metadata | None = None
        self._planner.set_up_planner(group_by_name(shards), None, is_first)
        self._writer.set_up_storage_writer(is_first)
        local = self._writer.prepare_local_plan(self._planner.create_local_plan())
        plans: list[SavePlan] = [local] * dist.get_world_size()
        dist.gather_object(local, plans if is_first else None)
        if is_first:
            plans, self._metadata = self._planner.create_global_plan(plans)
            plans = self._writer.prepare_global_plan(plans)
        received: list[SavePlan] = [local]
        dist.scatter_object_list(received, plans if is_first else None)
        self._plan = self._planner.finish_plan(received[0])

    def copy(self) -> None:
        """Copy the shards that this rank writes to the CPU, so that training can continue during `write`."""
        self._planner.copy(self._host_copies)

    def write(self) -> tuple[list[WriteResult], dict[str, FileRecord]]:
        """Write this rank's shards into one file, one shard at a time, and sync the file to disk.

        Torch's writer would keep all its copies, of views and of GPU tensors, until the file is complete
        (2.13).

        Returns:
            The positions of the shards, and the record of the file by its name; both empty without shards.
        """
        if not self._plan.items:
            return [], {}
        name = f"{self._plan.storage_data.prefix}0.distcp"
        results = []
        with HashedFile(self._folder / name) as file:
            for item in self._plan.items:
                begin = file.tell()
                tensor = self._host_copies.compact(self._planner.lookup_object(item.index))
                # The copy is not used again, and training waits for a save that does not copy.
                file.lend(tensor, tensor.data_ptr(), tensor.nbytes)
                torch.save(tensor, file)  # type: ignore[arg-type]  # it calls `write` and `flush` only
                position = _StorageInfo(name, begin, file.tell() - begin)
                results.append(WriteResult(item.index, position.length, position))
            file.sync()
            return results, {name: file.record()}

    def finish(self, results: list[list[WriteResult]]) -> None:
        """Write the metadata with the positions of all shards.

        Args:
            results: The positions that `write` returned on each rank.
        """
        assert self._metadata is not None, "only rank 0 has the metadata of the global plan"
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._folder))
        torch.save({}, self._folder / COMMON)


class _SavePlanner(DefaultSavePlanner):
    """The default planner, which can also copy this rank's shards."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._copies: dict[MetadataIndex, torch.Tensor] = {}

    def copy(self, host_copies: HostCopies) -> None:
        """Copy the shards in this rank's plan to the CPU."""
        for item in self.plan.items:
            self._copies[item.index] = host_copies.copy(self.lookup_object(item.index))

    @override
    def lookup_object(self, index: MetadataIndex) -> Any:
        copy = self._copies.get(index)
        return super().lookup_object(index) if copy is None else copy
