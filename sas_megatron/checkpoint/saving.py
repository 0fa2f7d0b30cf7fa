"""Writing checkpoints: aside, checked, published in one step, in the background if asked to.

begin (all ranks)  -> folder aside, who writes what, the engine's own files
write (each rank)  -> its share of the tensors, synced to disk, read again for the checksums
publish (rank 0)   -> index, progress, config, manifest; rename; old checkpoints go
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.storage import WriteResult

from sas_megatron.checkpoint import manifest
from sas_megatron.checkpoint.layout import describe_layout
from sas_megatron.checkpoint.manifest import FileRecord, Manifest
from sas_megatron.checkpoint.random_states import read_random_states, shard_random_states
from sas_megatron.checkpoint.tensor_reading import METADATA
from sas_megatron.checkpoint.tensor_writing import COMMON, FORMAT, TensorWriter, files_of
from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.object_collectives import raise_on_all_ranks, run_on_rank0
from sas_megatron.distributed.topology import Topology
from sas_megatron.io.files import sync

T = TypeVar("T")


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    partial: Path
    progress: dict[str, Any]
    tensors: TensorWriter
    # On this rank: the engine's own files that it is to check, what it wrote, or why it could not.
    other_files: list[Path]
    results: list[WriteResult]
    records: dict[str, FileRecord]
    problem: FileProblem | None = None
    thread: threading.Thread | None = None

    def write(self) -> None:
        """This rank's share, and the checksums of what it wrote."""
        self.results = self.tensors.write()
        paths = [self.partial / name for name in sorted(files_of(self.results))]
        for path in self.other_files:
            sync(path)
        self.records = _describe(self.partial, paths + self.other_files)

    def write_noting_problems(self) -> None:
        """As `write`, on a thread, whose exceptions nobody else would see."""
        try:
            _writing(self.partial, self.write)()
        except FileProblem as problem:
            self.problem = problem
        except BaseException as error:
            self.problem = FileProblem(self.partial, f"was not written ({error!r})", "see that error")

    def tell(self) -> None:
        """Raises what `write_noting_problems` noted."""
        if self.problem is not None:
            raise self.problem


class CheckpointSaver:
    """Saves a run's checkpoints; every rank must make the same calls.

    Every method raises `FileProblem`, the same on every rank, if a checkpoint could not be written: it is
    removed, and those before it are as they were.
    """

    def __init__(self, folder: Path, config: RunConfig, topology: Topology) -> None:
        """`folder` is the run's `checkpoints` folder."""
        self._folder = folder
        self._config = config
        self._topology = topology
        self._pending: _Pending | None = None

    def save(
        self,
        step: int,
        *,
        shards: list[ShardedTensor],
        progress: dict[str, Any],
        write_files: Callable[[Path], None],
    ) -> None:
        """Saves the checkpoint after `step` steps; with `checkpoint.asynchronous` only begins to.

        Args:
            step: Steps finished.
            shards: This rank's tensors; the random states come by themselves.
            progress: Numbers and texts that are the same on every rank.
            write_files: Writes the engine's own files into the folder that it is given.
        """
        self.finish()
        try:
            self._pending = self._begin(step, shards, progress, write_files)
            if self._config.checkpoint.asynchronous:
                self._pending.tensors.copy()
                self._pending.thread = threading.Thread(
                    target=self._pending.write_noting_problems, name="checkpoint", daemon=True
                )
                self._pending.thread.start()
                return
            raise_on_all_ranks(_writing(self._pending.partial, self._pending.write))
        except FileProblem:
            self._give_up(step)
            raise
        self._publish(self._pending)

    def finish_if_written(self) -> None:
        """Publishes a checkpoint that was begun, if all ranks have written their shares; call it often."""
        if self._pending is None or self._pending.thread is None:
            return
        is_written = torch.tensor(int(not self._pending.thread.is_alive()), device=self._topology.device)
        dist.all_reduce(is_written, op=dist.ReduceOp.MIN)
        if is_written:
            self.finish()

    def finish(self) -> None:
        """Waits for a checkpoint that was begun, and publishes it."""
        pending = self._pending
        if pending is None:
            return
        assert pending.thread is not None, "a checkpoint that is not written aside is finished at once"
        minutes = self._config.training.collective_timeout_minutes
        pending.thread.join(timeout=60 * minutes)
        if pending.thread.is_alive():
            pending.problem = FileProblem(
                pending.partial,
                f"was not written within {minutes:g} minutes (training.collective_timeout_minutes)",
                "look at the file system; the checkpoints before are whole",
            )
        try:
            raise_on_all_ranks(pending.tell)
        except FileProblem:
            self._give_up(pending.step)
            raise
        self._publish(pending)

    def _begin(
        self,
        step: int,
        shards: list[ShardedTensor],
        progress: dict[str, Any],
        write_files: Callable[[Path], None],
    ) -> _Pending:
        partial = manifest.partial_folder(self._folder, step)

        def make_folder() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        run_on_rank0(_writing(partial, make_folder))
        raise_on_all_ranks(_writing(partial, lambda: write_files(partial)))
        others = run_on_rank0(lambda: sorted(path for path in partial.rglob("*") if path.is_file()))
        random = shard_random_states(read_random_states())
        return _Pending(
            step=step,
            partial=partial,
            progress=progress,
            tensors=TensorWriter(partial, [*shards, *random]),
            other_files=others[self._topology.rank :: self._topology.world_size],
            results=[],
            records={},
        )

    def _publish(self, pending: _Pending) -> None:
        self._pending = None
        written = (pending.results, pending.records)
        by_rank = [written] * self._topology.world_size
        dist.gather_object(written, by_rank if self._topology.is_rank0 else None)
        try:
            run_on_rank0(_writing(pending.partial, lambda: self._complete(pending, by_rank)))
        except FileProblem:
            self._give_up(pending.step)
            raise
        settings = self._config.checkpoint

        def remove() -> None:
            manifest.remove_old(
                self._folder,
                newest=pending.step,
                keep_last=settings.keep_last,
                is_permanent=settings.is_permanent,
            )

        run_on_rank0(_writing(self._folder, remove))

    def _complete(
        self, pending: _Pending, by_rank: list[tuple[list[WriteResult], dict[str, FileRecord]]]
    ) -> None:
        partial = pending.partial
        pending.tensors.finish([results for results, _ in by_rank])
        manifest.write_synced(partial / manifest.PROGRESS, json.dumps(pending.progress) + "\n")
        manifest.write_synced(partial / manifest.CONFIG, dump_yaml(self._config))
        own = [partial / name for name in (METADATA, FORMAT, COMMON, manifest.PROGRESS, manifest.CONFIG)]
        for path in own:
            sync(path)
        files = {name: record for _, records in by_rank for name, record in records.items()}
        _check_seen_here(partial, files)
        manifest.publish(
            partial,
            Manifest(
                step=pending.step,
                engine=self._config.training.engine,
                layout=describe_layout(self._config),
                files=dict(sorted((files | _describe(partial, own)).items())),
            ),
        )

    def _give_up(self, step: int) -> None:
        """Leaves nothing of the checkpoint, whose space may be what is missing."""
        self._pending = None
        if self._topology.is_rank0:
            shutil.rmtree(manifest.partial_folder(self._folder, step), ignore_errors=True)


def _check_seen_here(folder: Path, files: dict[str, FileRecord]) -> None:
    """Raises `FileProblem` if what other ranks wrote did not come into this rank's folder."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.size_bytes:
            raise FileProblem(
                path,
                "was written by another rank, and is not there for rank 0",
                "put logging.run_directory on a file system that all ranks share",
            )


def _describe(folder: Path, paths: list[Path]) -> dict[str, FileRecord]:
    return {str(path.relative_to(folder)): manifest.describe_file(path) for path in paths}


def _writing(folder: Path, action: Callable[[], T]) -> Callable[[], T]:
    """`action`, with a failure to write turned into a `FileProblem`."""

    def attempt() -> T:
        with translate_os_errors(
            folder,
            problem="cannot be written",
            remedy="free disk space or fix the file system; the earlier checkpoints are complete, so resume "
            "from the last with checkpoint.resume=true",
        ):
            try:
                return action()
            except RuntimeError as error:
                # torch 2.13 replaces an OSError by an error about its file format.
                raise (
                    error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error))
                ) from error

    return attempt
