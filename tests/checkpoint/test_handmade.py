"""Tests that checkpoints made or changed by hand are refused, without reading outside of their folder."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.checkpoint.manifest import DamagedCheckpoint, describe_file, verify_checkpoint
from sas_megatron.checkpoint.tensor_files import StoredTensors
from sas_megatron.checkpoint.weights_source import read_record
from sas_megatron.config.errors import FileProblem
from sas_megatron.io.file_records import find_damage, read_regular_file
from tests.checkpoint.test_earlier_version import FIXTURES
from tests.checkpoint.test_manifest import write

DEEP = "[" * 100_000
EMPTY_FILE = {"size_bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}


def sign(path: Path, text: str) -> None:
    """Write manifest.json and the checksum that belongs to it."""
    (path / "manifest.json").write_text(text)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.sha256").write_text(f"{checksum}  manifest.json\n")


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest in place, record the files again, and sign it."""
    tree = json.loads((path / "manifest.json").read_text())
    for name in tree["files"]:
        tree["files"][name] = vars(describe_file(path / name))
    edit(tree)
    sign(path, json.dumps(tree))


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("zero", "zero is not a regular file"),
        ("pipe", "pipe is not a regular file"),
        ("link", "link is outside of the folder"),
        ("../outside", r"\.\./outside is outside of the folder"),
        ("/etc/hostname", "/etc/hostname is outside of the folder"),
        ("deeper/../../outside", "is outside of the folder"),
        ("a\0b", r"'a\\x00b' is not the name of a file"),
        ("\udc00\ud800", r"manifest\.json cannot be read \(.*surrogate"),
        ("", "is not a regular file"),
        ("deeper", "deeper is not a regular file"),
        ("loop", "loop cannot be read"),
        ("x" * 300, "cannot be read .File name too long"),
    ],
)
def test_a_listed_name_must_be_a_regular_file_in_the_folder(tmp_path: Path, name: str, problem: str) -> None:
    path = write(tmp_path, 3)
    (tmp_path / "outside").touch()
    (path / "zero").symlink_to("/dev/zero")
    (path / "link").symlink_to("../outside")
    (path / "loop").symlink_to("loop")
    os.mkfifo(path / "pipe")
    change(path, lambda tree: tree["files"].update({name: EMPTY_FILE}))
    with pytest.raises(DamagedCheckpoint, match=problem):
        verify_checkpoint(path)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sha256", "progress.json"])
@pytest.mark.parametrize("kind", ["device", "pipe", "huge file"])
def test_records_that_never_end_are_not_read(tmp_path: Path, name: str, kind: str) -> None:
    path = write(tmp_path, 3)
    (path / name).unlink()
    if kind == "device":
        (path / name).symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).touch()
        os.truncate(path / name, 2**40)  # sparse
    with pytest.raises(DamagedCheckpoint, match=r"cannot be read|is not a regular file|bytes"):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    "number", ["Infinity", "1e999", "NaN", '"3"', "true", "null", "[3]", "3.0", "1" * 5000]
)
def test_a_format_that_is_not_an_integer_is_damage(tmp_path: Path, number: str) -> None:
    path = write(tmp_path, 3)
    sign(path, (path / "manifest.json").read_text().replace('"schema": 3', f'"schema": {number}'))
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json cannot be read \("):
        verify_checkpoint(path)


@pytest.mark.parametrize("text", [DEEP, '{"schema": 3, "files": ' + DEEP, "[]", "3", "", '{"schema": 3}'])
def test_a_manifest_without_content_is_damage(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, 3)
    sign(path, text)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json cannot be read \("):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda tree: tree["files"].clear(), r"\.metadata is not in manifest\.json"),
        (lambda tree: tree["files"].pop("progress.json"), "progress.json is not in manifest.json"),
        (lambda tree: tree["files"].pop("config.yaml"), "config.yaml is not in manifest.json"),
        (lambda tree: tree.update(step=4), "has step 4, and the folder is named for step 3"),
        (lambda tree: tree.update(step=-3), "has a negative number"),
        (lambda tree: tree.update(step="3"), "step: Input should be a valid integer"),
        (lambda tree: tree.update(files=["weights"]), "files: Input should be"),
        (lambda tree: tree.update(layout=None), "layout: Input should be"),
        (lambda tree: tree["files"]["weights"].update(size_bytes=-1), "has a negative number"),
        (lambda tree: tree["files"]["weights"].update(size_bytes="198"), "files.weights.size_bytes: Input"),
        (lambda tree: tree["files"]["weights"].update(size_bytes=float("inf")), "files.weights.size_bytes:"),
        (lambda tree: tree["files"]["weights"].update(sha256=None), "files.weights.sha256: Input should"),
    ],
)
def test_a_manifest_that_was_edited_is_damage(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], problem: str
) -> None:
    path = write(tmp_path, 3)
    change(path, edit)
    with pytest.raises(DamagedCheckpoint, match=problem):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"counts": {"step": 4}, "engine": {"num_updates": 4}, "schedule_steps": 4}', "has step 4, and"),
        ('{"counts": {"step": 3}, "engine": {}, "schedule_steps": 3}', "has no engine.num_updates"),
        ('{"counts": {"step": 3}, "engine": {"num_updates": 3}}', "schedule_steps: Field required"),
        ('{"counts": {"step": "3"}, "engine": {"num_updates": 3}, "schedule_steps": 3}', "counts.step: "),
        ('{"counts": {"step": 3}, "engine": {"num_updates": NaN}, "schedule_steps": 3}', "engine.num_up"),
        ("[]", "the entire file: "),
        (DEEP, "its values are nested too deeply"),
        ("\0", "Expecting value"),
    ],
)
def test_progress_that_was_edited_is_damage(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, 3)
    (path / "progress.json").write_text(text)
    change(path, lambda tree: None)
    with pytest.raises(DamagedCheckpoint, match=rf"is damaged: progress\.json: {problem}"):
        verify_checkpoint(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a checkpoint that a run has written."""
    folder = tmp_path_factory.mktemp("saved")
    with tarfile.open(FIXTURES / "one_process.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "one_process" / "checkpoints" / "iter_0000002"


def move_shards(path: str) -> Callable[[Any], object]:
    """Return an edit after which all shards are in the file `path`."""
    return lambda metadata: metadata.storage_data.update(
        {index: replace(stored, relative_path=path) for index, stored in metadata.storage_data.items()}
    )


def first_tensor(metadata: Any) -> Any:
    return next(iter(metadata.state_dict_metadata.values()))


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (move_shards("../stolen"), r"'\.\./stolen' is not a file of this checkpoint"),
        (move_shards("unlisted.distcp"), "'unlisted.distcp' is not a file of this checkpoint"),
        (move_shards("/dev/zero"), "'/dev/zero' is not a file of this checkpoint"),
        (lambda metadata: first_tensor(metadata).chunks.clear(), "do not make up its shape"),
        (lambda metadata: setattr(first_tensor(metadata), "size", (2**62, 7)), "do not make up its shape"),
        (lambda metadata: setattr(first_tensor(metadata), "chunks", 5), "not iterable"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", 5), "no attribute 'items'"),
        (lambda metadata: setattr(metadata, "storage_data", None), "no attribute 'values'"),
    ],
)
def test_metadata_that_was_edited_is_damage(saved: Path, edit: Callable[[Any], object], problem: str) -> None:
    from sas_megatron.checkpoint.unsharded_weights import UnshardedWeights

    (saved.parent / "stolen").touch()
    (saved / "unlisted.distcp").touch()
    original = (saved / ".metadata").read_bytes()
    metadata = pickle.loads(original)
    edit(metadata)
    try:
        (saved / ".metadata").write_bytes(pickle.dumps(metadata))
        change(saved, lambda tree: None)
        verify_checkpoint(saved)
        with pytest.raises(DamagedCheckpoint, match=rf"tensors cannot be read \(\.metadata: .*({problem})"):
            UnshardedWeights(saved)
    finally:
        (saved / ".metadata").write_bytes(original)


@pytest.mark.parametrize(
    "content", [b"\x80\x04" + b"(" * 200_000, b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x80\x04]\x94\x8c", b""]
)
def test_pickles_that_are_damaged_or_too_deep_are_damage(tmp_path: Path, content: bytes) -> None:
    from sas_megatron.checkpoint.tensor_reading import TensorReader

    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"tensors cannot be read \(\.metadata: "):
        TensorReader(tmp_path).shapes()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"weight_map": {"w": "../model.safetensors"}}', r"outside of the folder \('\.\./model"),
        ('{"weight_map": {"w": "/model.safetensors"}}', "outside of the folder"),
        ('{"weight_map": {"w": "a/../../model.safetensors"}}', "outside of the folder"),
        ('{"weight_map": {"w": "model\\u0000.safetensors"}}', "outside of the folder"),
        ('{"weight_map": {"w": 7}}', r"is not an index of safetensors files \(weight_map.w: "),
        ('{"weight_map": ["model.safetensors"]}', "is not an index of safetensors files"),
        (DEEP, "is not an index of safetensors files .its values are nested too deeply"),
        ('{"weight_map": {"w": "pipe"}}', "is damaged, or not a safetensors file .*regular file"),
    ],
)
def test_an_index_names_only_files_in_its_folder(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "pipe")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FileProblem, match=problem):
        StoredTensors(tmp_path / "model", stem="model")


def test_weights_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "snapshot").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "blob")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blob")
    assert StoredTensors(tmp_path / "snapshot", stem="model")["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        '{"schema_version": "9", "architecture": {}, "weights_sha256": "", "origin": ""}',
        '{"schema_version": 1, "architecture": {}, "weights_sha256": "", "origin": ""}',
        DEEP,
        "[]",
    ],
)
def test_a_record_of_weights_that_was_edited_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "weights.json").write_text(text)
    with pytest.raises(FileProblem, match=r"weights\.json: is not a record of unsharded weights \("):
        read_record(tmp_path)


def test_regular_files_and_links_inside_the_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").symlink_to(".")
    record = describe_file(tmp_path / "file")
    assert find_damage(tmp_path, dict.fromkeys(("file", "link", "folder/file"), record)) == []
    assert read_regular_file(tmp_path / "link", max_bytes=7) == b"content"
    with pytest.raises(OSError, match="More than 6 bytes"):
        read_regular_file(tmp_path / "file", max_bytes=6)
