"""What is taken for a checkpoint, what is found in it, and what goes when there are too many."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sas_megatron.checkpoint.manifest import (
    SCHEMA,
    DamagedCheckpoint,
    FileRecord,
    Manifest,
    describe_file,
    find_checkpoints,
    find_own_share,
    partial_folder,
    publish,
    read_manifest,
    remove_old,
    verify_checkpoint,
)
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.training import CheckpointConfig


def write(folder: Path, step: int) -> Path:
    partial = partial_folder(folder, step)
    (partial / "deeper").mkdir(parents=True)
    paths = [partial / "weights", partial / "deeper" / "more"]
    for path in paths:
        path.write_bytes(bytes(range(step % 7, 201)))
    files = {str(path.relative_to(partial)): describe_file(path) for path in paths}
    return publish(partial, Manifest(step, "megatron", {"tensor": 3}, files))


def steps(folder: Path) -> list[int]:
    return [read_manifest(path).step for path in find_checkpoints(folder)]


def test_the_newest_comes_first_and_what_is_unfinished_is_none(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path / "none") == []
    for step in (9, 10_000_000, 10):
        write(tmp_path, step)
    for unfinished in ("iter_0000011.partial", "iter_0000012.replaced", "iter_00000x3", "other"):
        (tmp_path / unfinished).mkdir()
    assert steps(tmp_path) == [10_000_000, 10, 9]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    (write(tmp_path, 3) / "weights").write_text("damaged")
    verify_checkpoint(write(tmp_path, 3))
    remove_old(tmp_path, newest=3, keep_last=None, is_permanent=lambda _: False)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000003"]


def test_the_checksums_are_those_of_other_tools(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    subprocess.run(["sha256sum", "--check", "--strict", "manifest.sha256"], cwd=path, check=True, timeout=20)
    record = json.loads((path / "manifest.json").read_text())["files"]["deeper/more"]
    content = (path / "deeper/more").read_bytes()
    assert record == {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("name", ["weights", "deeper/more", "manifest.json", "manifest.sha256"])
def test_any_bit_and_any_byte_that_is_missing_shows(tmp_path: Path, name: str) -> None:
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
    with pytest.raises(DamagedCheckpoint, match=r"missing|no readable"):
        verify_checkpoint(path)
    (path / name).mkdir()  # cannot be read, whoever tries
    with pytest.raises(DamagedCheckpoint, match=r"no readable|bytes|cannot be read"):
        verify_checkpoint(path)
    (path / name).rmdir()
    (path / name).write_bytes(content)
    verify_checkpoint(path)


def test_every_damaged_file_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    (path / "weights").unlink()
    (path / "deeper/more").write_bytes(b"")
    with pytest.raises(
        DamagedCheckpoint,
        match=r"is damaged: deeper/more has 0 bytes, 198 were written; weights is missing; put it back from",
    ):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (SCHEMA + 1, rf"has format {SCHEMA + 1}, newer than {SCHEMA}; update the package"),
        (2, r"has format 2, older than 3; go on with the version that wrote it"),
        (1, r"has format 1, older than 3; go on with the version that wrote it"),
    ],
)
def test_other_versions_are_refused_and_not_taken_for_damage(
    tmp_path: Path, schema: int, message: str
) -> None:
    path = write(tmp_path, 3)
    text = json.dumps({**json.loads((path / "manifest.json").read_text()), "schema": schema})
    (path / "manifest.json").write_text(text)
    (path / "manifest.sha256").unlink()  # older ones have none, and newer ones may not
    with pytest.raises(FileProblem, match=message) as refusal:
        verify_checkpoint(path)
    assert not isinstance(refusal.value, DamagedCheckpoint)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
    with pytest.raises(FileProblem, match=message):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "at_steps", "left"),
    [
        (None, None, None, [6, 5, 4, 3, 2, 1]),
        (2, None, None, [6, 5]),
        (9, None, None, [6, 5, 4, 3, 2, 1]),
        (1, 2, None, [6, 4, 2]),
        (2, 3, None, [6, 5, 3]),
        (1, None, [2, 3], [6, 3, 2]),
    ],
)
def test_retention_keeps_the_newest_every_so_manieth_and_those_asked_for(
    tmp_path: Path, keep_last: int | None, keep_every: int | None, at_steps: list[int] | None, left: list[int]
) -> None:
    for step in range(1, 7):
        write(tmp_path, step)
    (tmp_path / "iter_0000007.partial").mkdir()
    (tmp_path / "not_ours").mkdir()
    settings = CheckpointConfig(keep_last=keep_last, keep_every=keep_every, at_steps=at_steps)
    remove_old(tmp_path, newest=6, keep_last=keep_last, is_permanent=settings.is_permanent)
    assert steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left) + 1


def test_retention_does_not_count_what_is_damaged(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    shutil.rmtree(tmp_path / "iter_0000005" / "deeper")
    (tmp_path / "iter_0000003" / "weights").write_bytes(b"cut")
    remove_old(tmp_path, newest=5, keep_last=1, is_permanent=lambda _: False)
    assert steps(tmp_path) == [5, 4]
    (tmp_path / "iter_0000004" / "manifest.json").write_text("{")
    remove_old(tmp_path, newest=5, keep_last=1, is_permanent=lambda _: False)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["iter_0000005", "iter_0000004"]


def test_retention_does_not_count_what_a_run_has_gone_back_from(tmp_path: Path) -> None:
    for step in (2, 4, 9):
        write(tmp_path, step)
    # Of the size that was written, as a rotten bit leaves it: only reading it all would tell.
    (tmp_path / "iter_0000009" / "weights").write_bytes(bytes(199))
    write(tmp_path, 5)
    remove_old(tmp_path, newest=5, keep_last=1, is_permanent=lambda _: False)
    assert steps(tmp_path) == [9, 5]


def test_ranks_share_out_the_reading() -> None:
    files = {f"file {size}": FileRecord(size, "") for size in (5, 70, 6, 90, 80)}
    shares = [find_own_share(files, rank=rank, num_ranks=2) for rank in range(2)]
    assert [sum(file.size_bytes for file in share.values()) for share in shares] == [165, 86]
    assert shares[0] | shares[1] == files
    assert not set(shares[0]) & set(shares[1])
