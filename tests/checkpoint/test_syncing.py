"""A checkpoint is published only after its contents are on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.checkpoint.manifest import find_checkpoints, verify_checkpoint
from sas_megatron.config.run import RunConfig
from tests.checkpoint.saved_runs import train_and_save
from tests.training.layouts import SHARDED, Layout


def save_and_record(config: RunConfig, folder: Path) -> dict[str, int]:
    """Save a checkpoint on a rank; return the sizes of the files synced before its folder was renamed."""
    synced: dict[str, int] = {}
    fsync, rename, is_published = os.fsync, Path.rename, False

    def recording_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not is_published:
            synced[path.name] = path.stat().st_size

    def recording_rename(path: Path, target: Path) -> Path:
        nonlocal is_published
        is_published = is_published or path.suffix == ".partial"
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recording_fsync)
        patch.setattr(Path, "rename", recording_rename)
        train_and_save(config, folder, 1)
    return synced


def test_every_file_is_synced_in_full_before_the_checkpoint_is_published(ranks: Any, tmp_path: Path) -> None:
    config = Layout(2, optimizer=SHARDED).config("sas-gather")
    first, second = ranks(2).run(save_and_record, config, tmp_path)
    (checkpoint,) = find_checkpoints(tmp_path)
    synced = first | second
    for path in checkpoint.rglob("*"):
        if path.is_file():
            assert synced.get(path.name) == path.stat().st_size, path.name
    assert f"{checkpoint.name}.partial" in synced, "the folder, which contains the file names, is synced"


def save_and_list_reads(config: RunConfig, folder: Path) -> list[str]:
    """Save a checkpoint on a rank; return the names of the files that are read for their checksums."""
    from sas_megatron.io import file_records

    read: list[str] = []
    open_regular_file = file_records.open_regular_file

    def recording_open(path: Path) -> Any:
        read.append(path.name)
        return open_regular_file(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_records, "open_regular_file", recording_open)
        train_and_save(config, folder, 1)
    return read


def test_files_of_tensors_are_not_read_again_for_their_checksums(ranks: Any, tmp_path: Path) -> None:
    config = Layout(2, optimizer=SHARDED).config("sas-gather")
    first, second = ranks(2).run(save_and_list_reads, config, tmp_path)
    (checkpoint,) = find_checkpoints(tmp_path)
    tensors = {path.name for path in checkpoint.glob("*.distcp")}
    assert len(tensors) == 2
    assert not tensors & {*first, *second}
    assert "progress.json" in first
    verify_checkpoint(checkpoint)
