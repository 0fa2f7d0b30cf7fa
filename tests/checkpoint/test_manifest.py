"""Manifest: which folders are checkpoints, how damage is found, and which checkpoints are removed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sas_megatron.checkpoint.manifest import (
    LATEST,
    SCHEMA,
    DamagedCheckpoint,
    Manifest,
    find_checkpoints,
    partial_folder,
    publish,
    read_manifest,
    remove_old_checkpoints,
    verify_checkpoint,
)
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.training import CheckpointConfig
from sas_megatron.io.file_records import FileRecord, describe_file, select_files_of_rank


def write(folder: Path, step: int) -> Path:
    """Publish a checkpoint of a few small files and return its folder."""
    partial = partial_folder(folder, step)
    (partial / "deeper").mkdir(parents=True)
    paths = [partial / "weights", partial / "deeper" / "more"]
    for path in paths:
        path.write_bytes(bytes(range(step % 7, 201)))
    progress = {"counts": {"step": step}, "engine": {"num_updates": step}, "schedule_steps": step}
    for name, text in {".metadata": "", "config.yaml": "", "progress.json": json.dumps(progress)}.items():
        paths.append(partial / name)
        paths[-1].write_text(text)
    files = {str(path.relative_to(partial)): describe_file(path) for path in paths}
    return publish(partial, Manifest(step, "megatron", {"tensor": 3}, files))


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, the newest first."""
    return [read_manifest(path).step for path in find_checkpoints(folder)]


def test_checkpoints_are_sorted_by_step_and_incomplete_ones_are_ignored(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path / "none") == []
    for step in (9, 10_000_000, 10):
        write(tmp_path, step)
    for incomplete in ("iter_0000011.partial", "iter_0000012.replaced", "iter_00000x3", "other"):
        (tmp_path / incomplete).mkdir()
    assert steps(tmp_path) == [10_000_000, 10, 9]


def test_publishing_a_step_again_replaces_the_checkpoint(tmp_path: Path) -> None:
    (write(tmp_path, 3) / "weights").write_text("damaged")
    verify_checkpoint(write(tmp_path, 3))
    remove_old_checkpoints(tmp_path, newest=3, keep_last=None, is_permanent=lambda _: False)
    # The file is Megatron-LM's name of the newest checkpoint.
    assert {path.name for path in tmp_path.iterdir()} == {"iter_0000003", LATEST}
    assert (tmp_path / LATEST).read_text() == "3"


def test_checksums_agree_with_sha256sum_and_hashlib(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    subprocess.run(["sha256sum", "--check", "--strict", "manifest.sha256"], cwd=path, check=True, timeout=20)
    record = json.loads((path / "manifest.json").read_text())["files"]["deeper/more"]
    content = (path / "deeper/more").read_bytes()
    assert record == {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", ["weights", "deeper/more", "manifest.json", "manifest.sha256"])
def test_changed_bits_and_missing_bytes_are_detected(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 3)
    content = (path / name).read_bytes()
    damaged = [content[:-1], content + b"\n", b""]
    for offset in {*range(0, len(content), 7), len(content) - 1}:
        for bit in (0, 3, 7):
            changed = bytearray(content)
            changed[offset] ^= 1 << bit
            damaged.append(bytes(changed))
    for version in damaged:
        (path / name).write_bytes(version)
        with pytest.raises(DamagedCheckpoint, match=name.replace(".", r"\.")):
            verify_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(DamagedCheckpoint, match=r"missing|cannot be read"):
        verify_checkpoint(path)
    (path / name).mkdir()  # A folder cannot be read as a file, even by root.
    with pytest.raises(DamagedCheckpoint, match=r"is not a regular file|cannot be read"):
        verify_checkpoint(path)
    (path / name).rmdir()
    (path / name).write_bytes(content)
    verify_checkpoint(path)


def test_one_message_names_all_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    (path / "weights").unlink()
    (path / "deeper/more").write_bytes(b"")
    with pytest.raises(
        DamagedCheckpoint,
        match=r"is damaged: deeper/more has 0 bytes, but 198 were written; weights is missing; restore it",
    ):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (SCHEMA + 1, rf"has format {SCHEMA + 1}, newer than {SCHEMA}; update the package"),
        (2, r"has format 2, older than 3; resume with the version that wrote it"),
        (1, r"has format 1, older than 3; resume with the version that wrote it"),
    ],
)
def test_other_formats_are_rejected_without_being_reported_as_damage(
    tmp_path: Path, schema: int, message: str
) -> None:
    path = write(tmp_path, 3)
    text = json.dumps({**json.loads((path / "manifest.json").read_text()), "schema": schema})
    (path / "manifest.json").write_text(text)
    (path / "manifest.sha256").unlink()  # Older formats have no checksum, and newer ones may not.
    with pytest.raises(FileProblem, match=message) as raised:
        verify_checkpoint(path)
    assert not isinstance(raised.value, DamagedCheckpoint)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
    with pytest.raises(FileProblem, match=message):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "at_steps", "kept"),
    [
        (None, None, None, [6, 5, 4, 3, 2, 1]),
        (2, None, None, [6, 5]),
        (9, None, None, [6, 5, 4, 3, 2, 1]),
        (1, 2, None, [6, 4, 2]),
        (2, 3, None, [6, 5, 3]),
        (1, None, [2, 3], [6, 3, 2]),
    ],
)
def test_retention_keeps_the_newest_regular_and_requested_checkpoints(
    tmp_path: Path, keep_last: int | None, keep_every: int | None, at_steps: list[int] | None, kept: list[int]
) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    (tmp_path / "iter_0000007.partial").mkdir()
    (tmp_path / "not_ours").mkdir()
    settings = CheckpointConfig(keep_last=keep_last, keep_every=keep_every, at_steps=at_steps)
    remove_old_checkpoints(tmp_path, newest=6, keep_last=keep_last, is_permanent=settings.is_permanent)
    assert steps(tmp_path) == kept
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == len(kept) + 1


def test_retention_does_not_count_damaged_checkpoints(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    shutil.rmtree(tmp_path / "iter_0000005" / "deeper")
    (tmp_path / "iter_0000003" / "weights").write_bytes(b"cut")
    remove_old_checkpoints(tmp_path, newest=5, keep_last=1, is_permanent=lambda _: False)
    assert steps(tmp_path) == [5, 4]
    (tmp_path / "iter_0000004" / "manifest.json").write_text("{")
    remove_old_checkpoints(tmp_path, newest=5, keep_last=1, is_permanent=lambda _: False)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["iter_0000005", "iter_0000004"]


def test_retention_does_not_count_checkpoints_after_the_resumed_step(tmp_path: Path) -> None:
    for step in (2, 4, 9):
        write(tmp_path, step)
    # The size is unchanged, so the damage shows only in the checksum.
    (tmp_path / "iter_0000009" / "weights").write_bytes(bytes(199))
    write(tmp_path, 5)
    remove_old_checkpoints(tmp_path, newest=5, keep_last=1, is_permanent=lambda _: False)
    assert steps(tmp_path) == [9, 5]


def test_of_a_linked_checkpoint_only_the_link_is_removed(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step in (1, 2):
        (folder / f"iter_000000{step}").parent.mkdir(exist_ok=True)
        (folder / f"iter_000000{step}").symlink_to(write(elsewhere, step))
    # A removal that was interrupted, and a link to nothing.
    (folder / "iter_0000009.replaced").symlink_to(elsewhere / "iter_0000001")
    (folder / "iter_0000003").symlink_to(elsewhere / "iter_0000003")
    write(folder, 3)
    assert remove_old_checkpoints(folder, newest=3, keep_last=1, is_permanent=lambda _: False)
    assert {path.name for path in folder.glob("iter_*")} == {"iter_0000003"}
    for step in (1, 2):
        verify_checkpoint(elsewhere / f"iter_000000{step}")


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a file"])
def test_a_checkpoint_that_is_no_folder_is_damaged(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "iter_0000050"
    if kind == "file":
        path.write_text("")
    else:
        path.symlink_to(tmp_path / "nothing" if kind == "link to nothing" else __file__)
    with pytest.raises(
        DamagedCheckpoint, match=r"0000050: is damaged: it is not a folder, nor a link to one; "
    ):
        read_manifest(path)
    with pytest.raises(FileProblem, match="is not a folder; name a checkpoint") as raised:
        read_manifest(tmp_path / "iter_0000051")
    assert not isinstance(raised.value, DamagedCheckpoint)


def test_ranks_together_read_each_file_once() -> None:
    files = {f"file {size}": FileRecord(size, "") for size in (5, 70, 6, 90, 80)}
    files_by_rank = [select_files_of_rank(files, rank=rank, num_ranks=2) for rank in range(2)]
    assert [sum(file.size_bytes for file in share.values()) for share in files_by_rank] == [165, 86]
    assert files_by_rank[0] | files_by_rank[1] == files
    assert not set(files_by_rank[0]) & set(files_by_rank[1])
