"""Saving and resuming: damaged checkpoints, failed writes, asynchronous saves, and unsafe metadata."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.manifest import find_checkpoints, verify_checkpoint
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.run import RunConfig
from tests.checkpoint.saved_runs import read_unsharded_tensors, save, take_steps_from, train_and_save
from tests.full_disk import no_file_longer_than
from tests.rank_pool import in_layout
from tests.selection import cases
from tests.training.layouts import SHARDED, Layout

TWO = Layout(2, optimizer=SHARDED)


def config_with(layout: Layout = TWO, **checkpoint: Any) -> RunConfig:
    """Return a SAS config with fields of the section `checkpoint`."""
    from sas_megatron.config.loading import build_run_config

    return build_run_config({**layout.config("sas-gather").model_dump(mode="json"), "checkpoint": checkpoint})


def find_newest(folder: Path) -> tuple[str, list[str]]:
    """Return the name of the newest intact checkpoint, or the error message, and the logged messages."""
    from sas_megatron.checkpoint.restoring import find_newest_complete

    in_layout(TWO.config("mha").parallel)
    logged: list[str] = []
    try:
        checkpoint = find_newest_complete(folder, log=logged.append)
    except FileProblem as problem:
        return str(problem), logged
    return "none" if checkpoint is None else checkpoint.path.name, logged


@pytest.fixture(scope="module")
def two_checkpoints(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint after one step and another after two."""
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        ranks(2).run(train_and_save, config_with(), folder, step)
    return folder


def test_a_missing_folder_contains_no_checkpoint(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2).run(find_newest, tmp_path / "missing") == [("none", [])] * 2


def test_every_damaged_file_is_logged_and_the_previous_checkpoint_is_used(
    ranks: Any, two_checkpoints: Path
) -> None:
    newest, before = find_checkpoints(two_checkpoints)
    assert ranks(2).run(find_newest, two_checkpoints) == [(newest.name, [])] * 2
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        *("__0_0.distcp", "__1_0.distcp", ".metadata", "metadata.json", "common.pt"),
        *("progress.json", "config.yaml", "manifest.json", "manifest.sha256"),
    }
    draw = random.Random(4)
    for path in files:
        content = path.read_bytes()
        offset = draw.randrange(len(content))
        flipped = bytearray(content)
        flipped[offset] ^= 1 << draw.randrange(8)
        for damaged in (content[:-1], bytes(flipped), None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            for found, logged in ranks(2).run(find_newest, two_checkpoints):
                assert found == before.name, (path.name, offset)
                (line,) = logged
                assert line.startswith(f"{newest}: is damaged: ")
                assert path.name in line
                assert line.endswith("; trying the previous checkpoint")
        path.write_bytes(content)
    verify_checkpoint(newest)


def test_an_error_is_raised_if_all_checkpoints_are_damaged(
    ranks: Any, two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    for path in find_checkpoints(folder):
        (path / "__1_0.distcp").unlink()
    for found, logged in ranks(2).run(find_newest, folder):
        assert found.startswith(f"{folder}: contains no intact checkpoint: 2 are damaged; restore one")
        assert len(logged) == 2


def test_a_newer_format_is_rejected_on_every_rank(ranks: Any, two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    manifest = find_checkpoints(folder)[0] / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    (manifest.parent / "manifest.sha256").unlink()
    for found, _ in ranks(2).run(find_newest, folder):
        assert found == f"{manifest.parent}: has format 99, newer than 3; update the package"


def save_on_a_full_disk(config: RunConfig, folder: Path, full_on: int, num_bytes: int) -> str:
    """Return the error message of a second checkpoint, which one rank cannot write."""
    from sas_megatron.training.build import build_engine

    topology = in_layout(config.parallel)
    engine = build_engine(config)
    take_steps_from(engine, topology, 0, 1)
    save(engine, topology, folder, 1)
    take_steps_from(engine, topology, 1, 1)
    is_full = topology.rank == full_on
    with no_file_longer_than(num_bytes) if is_full else contextlib.nullcontext():
        try:
            save(engine, topology, folder, 2)
        except FileProblem as problem:
            return str(problem)
    return "saved"


@pytest.mark.parametrize(
    ("full_on", "num_bytes", "asynchronous"),
    cases(
        [
            (*full, asynchronous)
            for full in ((0, 20_000), (1, 20_000), (0, 200), (1, 0))
            for asynchronous in (False, True)
        ],
        # The disk becomes full on each rank, for both kinds of saves, in the tensors or in the first file.
        default=[(0, 20_000, False), (1, 20_000, True), (0, 200, True), (1, 0, False)],
    ),
)
def test_a_full_disk_is_reported_and_keeps_the_previous_checkpoint(
    ranks: Any, tmp_path: Path, full_on: int, num_bytes: int, asynchronous: bool
) -> None:
    config = config_with(asynchronous=asynchronous)
    messages = ranks(2).run(save_on_a_full_disk, config, tmp_path, full_on, num_bytes)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{tmp_path / 'iter_0000002.partial'}: cannot be written (File too large")
    assert messages[0].endswith("resume from the last one with checkpoint.resume=true")
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000001"]
    verify_checkpoint(tmp_path / "iter_0000001")


def save_without_permission_to_delete(config: RunConfig, folder: Path) -> list[str]:
    """Save three checkpoints while no folder can be removed, and return the warnings of this rank."""
    from sas_megatron.checkpoint import manifest, saving
    from sas_megatron.training.build import build_engine

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    topology = in_layout(config.parallel)
    engine = build_engine(config)
    warnings: list[str] = []
    delete, warn = manifest._delete, saving.logger.warning
    manifest._delete = refuse
    saving.logger.warning = lambda text, *values: warnings.append(text % values)  # type: ignore[method-assign]
    try:
        for step in (1, 2, 3):
            save(engine, topology, folder, step)
    finally:
        manifest._delete, saving.logger.warning = delete, warn  # type: ignore[method-assign]
    return warnings


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(ranks: Any, tmp_path: Path) -> None:
    warnings, others = ranks(2).run(save_without_permission_to_delete, config_with(keep_last=1), tmp_path)
    assert not others
    assert warnings
    for warning in warnings:
        assert warning == (
            f"{tmp_path}: an old checkpoint cannot be removed (Permission denied); remove it by hand"
        )
    verify_checkpoint(tmp_path / "iter_0000003")


def test_a_folder_that_cannot_be_created_is_reported_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file instead of the folder")
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*partial: cannot be written \("):
        ranks(2).run(train_and_save, config_with(), tmp_path / "checkpoints", 1)


def save_while_training(config: RunConfig, folder: Path) -> list[float]:
    """Train while checkpoints are being written."""
    from sas_megatron.checkpoint.saving import CheckpointSaver
    from sas_megatron.training.build import build_engine

    topology = in_layout(config.parallel)
    engine = build_engine(config)
    saver = CheckpointSaver(folder, config, topology)
    losses = []
    for step in range(1, 4):
        losses += take_steps_from(engine, topology, step - 1, 1)
        saver.save(
            step,
            shards=engine.shards(),
            progress={"counts": {"step": step}, "engine": engine.counts(), "schedule_steps": step},
            write_files=engine.write_files,
        )
        with torch.no_grad():  # Changes of the weights during the save must not reach the files.
            for parameter in engine.model_chunks[0].parameters():
                parameter.add_(1.0)
            saver.finish_if_written()
            for parameter in engine.model_chunks[0].parameters():
                parameter.sub_(1.0)
    saver.finish()
    return losses


def test_asynchronous_checkpoints_contain_the_weights_at_the_call_of_save(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(save_while_training, config_with(), tmp_path / "synchronous")
    ranks(2).run(save_while_training, config_with(asynchronous=True, keep_last=2), tmp_path / "asynchronous")
    assert [path.name for path in find_checkpoints(tmp_path / "asynchronous")] == [
        "iter_0000003",
        "iter_0000002",
    ]
    for path in find_checkpoints(tmp_path / "asynchronous"):
        verify_checkpoint(path)
        expected = read_unsharded_tensors(tmp_path / "synchronous" / path.name)
        for name, tensor in read_unsharded_tensors(path).items():
            assert torch.equal(tensor, expected[name]), name


def save_with_failing_thread(config: RunConfig, folder: Path) -> None:
    """Save a checkpoint whose writing thread fails on rank 1."""
    from sas_megatron.checkpoint.tensor_writing import TensorWriter
    from sas_megatron.training.build import build_engine

    topology = in_layout(config.parallel)
    original_write = TensorWriter.write
    if topology.rank == 1:
        TensorWriter.write = raise_memory_error  # type: ignore[method-assign]
    try:
        save(build_engine(config), topology, folder, 1)
    finally:
        TensorWriter.write = original_write  # type: ignore[method-assign]


def raise_memory_error(_writer: Any) -> Any:
    raise MemoryError


def test_no_checkpoint_is_published_if_a_writing_thread_fails(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 0:(.|\n)*partial: was not written \(MemoryError\(\)\)"):
        ranks(2).run(save_with_failing_thread, config_with(asynchronous=True), tmp_path)
    assert not list(tmp_path.iterdir())


def pickle_class(name: str) -> bytes:
    """Return the pickle of a name in the module of torch's tensor metadata."""
    parts = (b"torch.distributed.checkpoint.metadata", name.encode())
    return b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts) + b"\x93"


def pickle_string(value: str) -> bytes:
    """Return the pickle of a string."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def pickle_call_of_builtin(code: str) -> bytes:
    """Return a pickle that calls `exec`."""
    return b"cbuiltins\nexec\n(" + pickle_string(code) + b"tR."


def pickle_call_through_attributes(code: str) -> bytes:
    """Return a pickle that reaches `exec` through the globals of a method of an allowed class."""
    globals_of_method = "MetadataIndex.__init__.__globals__"
    builtins = pickle_class(f"{globals_of_method}.get") + pickle_string("__builtins__") + b"\x85R"
    run = pickle_class(f"{globals_of_method}.__class__.get") + builtins + pickle_string("exec") + b"\x86R"
    return b"\x80\x04" + run + pickle_string(code) + b"\x85R."


def pickle_bytes_metadata(_code: str) -> bytes:
    """Return metadata of bytes, which torch would unpickle when it reads them."""
    return b"\x80\x04" + pickle_class("BytesStorageMetadata") + b")\x81."


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        (pickle_call_of_builtin, "builtins.exec"),
        (pickle_call_through_attributes, "torch.distributed.checkpoint.metadata.MetadataIndex.__init__."),
        (pickle_bytes_metadata, "torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
    ],
)
def test_loading_runs_no_code_from_the_metadata(
    tmp_path: Path, pickled: Callable[[str], bytes], name: str
) -> None:
    from sas_megatron.checkpoint.tensor_reading import TensorReader

    mark = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickled(f"open({str(mark)!r}, 'w')"))
    with pytest.raises(FileProblem, match=rf"\.metadata: refers to {re.escape(name)}"):
        TensorReader(tmp_path).shapes()
    assert not mark.exists()


def test_a_checkpoint_of_another_model_is_rejected_with_name_and_shape(
    ranks: Any, two_checkpoints: Path
) -> None:
    other = config_with(Layout(2, model={"ffn_hidden_size": 36}))
    with pytest.raises(
        AssertionError,
        match=r"has shape \[56, 20\] for .*linear_fc1\.weight, whose shape in this run is \[72, 20\]",
    ):
        ranks(2).run(restore_from, other, find_checkpoints(two_checkpoints)[0])


def restore_from(config: RunConfig, path: Path) -> None:
    """Restore a checkpoint on a rank."""
    from sas_megatron.checkpoint.restoring import open_checkpoint
    from sas_megatron.training.build import build_engine

    in_layout(config.parallel)
    build_engine(config).restore(open_checkpoint(path))
