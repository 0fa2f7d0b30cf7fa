"""Save checkpoints: write to a temporary folder, optionally in the background, and publish atomically.

begin (all ranks)  -> temporary folder; plan which rank writes which shard; files of the engine
write (each rank)  -> its shards, hashed while they are written, and synced to disk
publish (rank 0)   -> metadata, progress, config, manifest; rename the folder; remove old checkpoints
"""

from __future__ import annotations

import json
import logging
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
from sas_megatron.checkpoint.manifest import Manifest
from sas_megatron.checkpoint.rank_layout import describe_layout, read_random_states, shard_random_states
from sas_megatron.checkpoint.tensor_writing import COMMON, FORMAT, TensorWriter
from sas_megatron.config.errors import FileProblem, describe_os_error, translate_os_errors
from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.object_collectives import raise_on_all_ranks, run_on_rank0
from sas_megatron.distributed.topology import Topology
from sas_megatron.io.file_records import FileRecord, describe_file
from sas_megatron.io.files import sync

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass
class _Pending:
    """A checkpoint that is being written, with this rank's contribution to it."""

    step: int
    partial: Path
    progress: dict[str, Any]
    tensors: TensorWriter
    # Files of the engine whose checksums this rank computes.
    engine_files: list[Path]
    results: list[WriteResult]
    records: dict[str, FileRecord]
    # The error with which the writing thread ended.
    problem: FileProblem | None = None
    thread: threading.Thread | None = None

    def write(self) -> None:
        """Write this rank's shards and compute the checksums of its files."""
        self.results, records = self.tensors.write()
        for path in self.engine_files:
            sync(path)
        self.records = records | _describe(self.partial, self.engine_files)

    def write_in_thread(self) -> None:
        """Run `write` in a thread and store its exception for `raise_if_failed`."""
        try:
            _with_error_translation(self.partial, self.write)()
        except FileProblem as problem:
            self.problem = problem
        except BaseException as error:
            self.problem = FileProblem(
                self.partial, f"was not written ({error!r})", "fix the cause of that error"
            )

    def raise_if_failed(self) -> None:
        """Raise the stored exception of `write_in_thread`, if any.

        Raises:
            FileProblem: The thread failed.
        """
        if self.problem is not None:
            raise self.problem


class CheckpointSaver:
    """Saves the checkpoints of a run. Every rank must make the same calls.

    Every method raises `FileProblem`, the same on every rank, if a checkpoint could not be written. The
    incomplete checkpoint is then removed; earlier checkpoints are not affected.
    """

    def __init__(self, folder: Path, config: RunConfig, topology: Topology) -> None:
        """Create a saver.

        Args:
            folder: The `checkpoints` folder of the run.
            config: Config of the run.
            topology: The process groups.
        """
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
        """Save a checkpoint. With `checkpoint.asynchronous`, return while a thread is still writing it.

        Args:
            step: Number of completed steps.
            shards: This rank's shards, without the random states, which the saver adds.
            progress: Numbers and strings that are the same on every rank.
            write_files: Writes the engine's additional files into the folder that it receives.

        Raises:
            FileProblem: The checkpoint could not be written.
        """
        self.finish()
        try:
            self._pending = self._begin(step, shards, progress, write_files)
            if self._config.checkpoint.asynchronous:
                self._pending.tensors.copy()
                self._pending.thread = threading.Thread(
                    target=self._pending.write_in_thread, name="checkpoint", daemon=True
                )
                self._pending.thread.start()
                return
            raise_on_all_ranks(_with_error_translation(self._pending.partial, self._pending.write))
        except FileProblem:
            self._discard(step)
            raise
        self._publish(self._pending)

    def finish_if_written(self) -> None:
        """Publish a pending checkpoint if all ranks have written their shards. Call this after every step.

        Raises:
            FileProblem: The checkpoint could not be written.
        """
        if self._pending is None or self._pending.thread is None:
            return
        is_written = torch.tensor(int(not self._pending.thread.is_alive()), device=self._topology.device)
        dist.all_reduce(is_written, op=dist.ReduceOp.MIN)
        if is_written:
            self.finish()

    def finish(self) -> None:
        """Wait for a pending checkpoint, if any, and publish it.

        Raises:
            FileProblem: The checkpoint could not be written, or not within
                `training.collective_timeout_minutes`.
        """
        pending = self._pending
        if pending is None:
            return
        assert pending.thread is not None, "a synchronous checkpoint is published by save()"
        minutes = self._config.training.collective_timeout_minutes
        pending.thread.join(timeout=60 * minutes)
        if pending.thread.is_alive():
            pending.problem = FileProblem(
                pending.partial,
                f"was not written within {minutes:g} minutes (training.collective_timeout_minutes)",
                "check the file system; earlier checkpoints are intact",
            )
        try:
            raise_on_all_ranks(pending.raise_if_failed)
        except FileProblem:
            self._discard(pending.step)
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

        run_on_rank0(_with_error_translation(partial, make_folder))
        raise_on_all_ranks(_with_error_translation(partial, lambda: write_files(partial)))
        engine_files = run_on_rank0(lambda: sorted(path for path in partial.rglob("*") if path.is_file()))
        random = shard_random_states(read_random_states())
        return _Pending(
            step=step,
            partial=partial,
            progress=progress,
            tensors=TensorWriter(partial, [*shards, *random]),
            engine_files=engine_files[self._topology.rank :: self._topology.world_size],
            results=[],
            records={},
        )

    def _publish(self, pending: _Pending) -> None:
        self._pending = None
        written = (pending.results, pending.records)
        by_rank = [written] * self._topology.world_size
        dist.gather_object(written, by_rank if self._topology.is_rank0 else None)
        try:
            run_on_rank0(_with_error_translation(pending.partial, lambda: self._complete(pending, by_rank)))
        except FileProblem:
            self._discard(pending.step)
            raise
        settings = self._config.checkpoint

        def remove() -> None:
            try:
                manifest.remove_old_checkpoints(
                    self._folder,
                    newest=pending.step,
                    keep_last=settings.keep_last,
                    is_permanent=settings.is_permanent,
                )
            except OSError as error:
                # The new checkpoint is complete: the run continues, and the next save tries again.
                logger.warning(
                    "%s: an old checkpoint cannot be removed (%s); remove it by hand",
                    self._folder,
                    describe_os_error(error),
                )

        run_on_rank0(remove)

    def _complete(
        self, pending: _Pending, by_rank: list[tuple[list[WriteResult], dict[str, FileRecord]]]
    ) -> None:
        partial = pending.partial
        pending.tensors.finish([results for results, _ in by_rank])
        manifest.write_synced(partial / manifest.PROGRESS, json.dumps(pending.progress) + "\n")
        manifest.write_synced(partial / manifest.CONFIG, dump_yaml(self._config))
        paths = [
            partial / name for name in (manifest.METADATA, FORMAT, COMMON, manifest.PROGRESS, manifest.CONFIG)
        ]
        for path in paths:
            sync(path)
        files = {name: record for _, records in by_rank for name, record in records.items()}
        _raise_if_missing(partial, files)
        manifest.publish(
            partial,
            Manifest(
                step=pending.step,
                engine=self._config.training.engine,
                layout=describe_layout(self._config),
                files=dict(sorted((files | _describe(partial, paths)).items())),
            ),
        )

    def _discard(self, step: int) -> None:
        """Remove the incomplete checkpoint, also to free space on a full disk."""
        self._pending = None
        if self._topology.is_rank0:
            shutil.rmtree(manifest.partial_folder(self._folder, step), ignore_errors=True)


def _raise_if_missing(folder: Path, files: dict[str, FileRecord]) -> None:
    """Raise `FileProblem` if rank 0 does not see the files that the other ranks wrote."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.size_bytes:
            raise FileProblem(
                path,
                "was written by another rank but is not visible to rank 0",
                "set logging.run_directory to a folder on a file system that all ranks share",
            )


def _describe(folder: Path, paths: list[Path]) -> dict[str, FileRecord]:
    return {str(path.relative_to(folder)): describe_file(path) for path in paths}


def _with_error_translation(folder: Path, action: Callable[[], T]) -> Callable[[], T]:
    """Return a function that calls `action` and translates write errors into `FileProblem`."""

    def attempt() -> T:
        with translate_os_errors(
            folder,
            problem="cannot be written",
            remedy="free disk space or fix the file system; earlier checkpoints are intact, so resume from "
            "the last one with checkpoint.resume=true",
        ):
            try:
                return action()
            except RuntimeError as error:
                # torch 2.13 replaces an OSError by an error about its file format.
                cause = error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error))
                raise cause from error

    return attempt
