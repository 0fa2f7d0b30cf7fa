"""Damage is found and gone back from, faults while saving harm nothing, and training need not wait."""

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
from tests.checkpoint.saved_runs import save, take_steps_from, train_and_save, whole_tensors
from tests.full_disk import no_file_longer_than
from tests.rank_pool import in_layout
from tests.selection import cases
from tests.training.layouts import SHARDED, Layout

TWO = Layout(2, optimizer=SHARDED)


def config_with(layout: Layout = TWO, **checkpoint: Any) -> RunConfig:
    from sas_megatron.config.loading import build_run_config

    return build_run_config({**layout.config("sas-gather").model_dump(mode="json"), "checkpoint": checkpoint})


def look_for_newest(folder: Path) -> tuple[str, list[str]]:
    """On a rank: the newest whole checkpoint, or the problem; and what was said on the way."""
    from sas_megatron.checkpoint.loading import find_newest_complete

    in_layout(TWO.config("mha").parallel)
    said: list[str] = []
    try:
        checkpoint = find_newest_complete(folder, say=said.append)
    except FileProblem as problem:
        return str(problem), said
    return "none" if checkpoint is None else checkpoint.path.name, said


@pytest.fixture(scope="module")
def two_checkpoints(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After one step and after two."""
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        ranks(2).run(train_and_save, config_with(), folder, step)
    return folder


def test_without_checkpoints_there_is_none(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2).run(look_for_newest, tmp_path / "missing") == [("none", [])] * 2


def test_every_damaged_file_is_said_and_the_checkpoint_before_taken(
    ranks: Any, two_checkpoints: Path
) -> None:
    newest, before = find_checkpoints(two_checkpoints)
    assert ranks(2).run(look_for_newest, two_checkpoints) == [(newest.name, [])] * 2
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
            for found, said in ranks(2).run(look_for_newest, two_checkpoints):
                assert found == before.name, (path.name, offset)
                (line,) = said
                assert line.startswith(f"{newest}: is damaged: ")
                assert path.name in line
                assert line.endswith("; going back to the checkpoint before")
        path.write_bytes(content)
    verify_checkpoint(newest)


def test_where_all_are_damaged_the_run_does_not_begin_anew(
    ranks: Any, two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    for path in find_checkpoints(folder):
        (path / "__1_0.distcp").unlink()
    for found, said in ranks(2).run(look_for_newest, folder):
        assert found.startswith(f"{folder}: holds no checkpoint that is whole: 2 are damaged; put one back")
        assert len(said) == 2


def test_a_newer_version_is_refused_on_every_rank(ranks: Any, two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    manifest = find_checkpoints(folder)[0] / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "schema": 99}))
    (manifest.parent / "manifest.sha256").unlink()
    for found, _ in ranks(2).run(look_for_newest, folder):
        assert found == f"{manifest.parent}: has format 99, newer than 3; update the package"


def save_on_a_full_disk(config: RunConfig, folder: Path, full_on: int, num_bytes: int) -> str:
    """On a rank: what is said of a second checkpoint that one rank cannot write."""
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
        # On each rank, of each way to write: within the tensors, and within the first file that is written.
        default=[(0, 20_000, False), (1, 20_000, True), (0, 200, True), (1, 0, False)],
    ),
)
def test_a_full_disk_is_said_and_leaves_the_last_checkpoint(
    ranks: Any, tmp_path: Path, full_on: int, num_bytes: int, asynchronous: bool
) -> None:
    config = config_with(asynchronous=asynchronous)
    said = ranks(2).run(save_on_a_full_disk, config, tmp_path, full_on, num_bytes)
    assert said[0] == said[1]
    assert said[0].startswith(f"{tmp_path / 'iter_0000002.partial'}: cannot be written (File too large")
    assert said[0].endswith("resume from the last with checkpoint.resume=true")
    assert [path.name for path in tmp_path.iterdir()] == ["iter_0000001"]
    verify_checkpoint(tmp_path / "iter_0000001")


def test_a_folder_that_cannot_be_made_is_said_on_every_rank(ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*partial: cannot be written \("):
        ranks(2).run(train_and_save, config_with(), tmp_path / "checkpoints", 1)


def save_and_go_on(config: RunConfig, folder: Path) -> list[float]:
    """On a rank: steps while the first checkpoint is being written."""
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
            progress={"engine": engine.counts()},
            write_files=engine.write_files,
        )
        with torch.no_grad():  # what is done to the weights now must not reach the files
            for parameter in engine.model_chunks[0].parameters():
                parameter.add_(1.0)
            saver.finish_if_written()
            for parameter in engine.model_chunks[0].parameters():
                parameter.sub_(1.0)
    saver.finish()
    return losses


def test_asynchronous_checkpoints_hold_what_was_when_they_were_begun(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(save_and_go_on, config_with(), tmp_path / "at once")
    ranks(2).run(save_and_go_on, config_with(asynchronous=True, keep_last=2), tmp_path / "behind")
    assert [path.name for path in find_checkpoints(tmp_path / "behind")] == ["iter_0000003", "iter_0000002"]
    for path in find_checkpoints(tmp_path / "behind"):
        verify_checkpoint(path)
        expected = whole_tensors(tmp_path / "at once" / path.name)
        for name, tensor in whole_tensors(path).items():
            assert torch.equal(tensor, expected[name]), name


def save_while_memory_runs_out(config: RunConfig, folder: Path) -> None:
    """On a rank: on the second of which the writing thread fails."""
    from sas_megatron.checkpoint.tensor_writing import TensorWriter
    from sas_megatron.training.build import build_engine

    topology = in_layout(config.parallel)
    kept = TensorWriter.write
    if topology.rank == 1:
        TensorWriter.write = raise_memory_error  # type: ignore[method-assign]
    try:
        save(build_engine(config), topology, folder, 1)
    finally:
        TensorWriter.write = kept  # type: ignore[method-assign]


def raise_memory_error(_writer: Any) -> Any:
    raise MemoryError


def test_whatever_ends_the_writing_thread_nothing_incomplete_is_published(ranks: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 0:(.|\n)*partial: was not written \(MemoryError\(\)\)"):
        ranks(2).run(save_while_memory_runs_out, config_with(asynchronous=True), tmp_path)
    assert not list(tmp_path.iterdir())


def named(name: str) -> bytes:
    """Pickled: what torch's descriptions of tensors have under a name."""
    parts = (b"torch.distributed.checkpoint.metadata", name.encode())
    return b"".join(b"\x8c" + bytes([len(part)]) + part for part in parts) + b"\x93"


def text(value: str) -> bytes:
    """Pickled: a string."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def calls_a_function(code: str) -> bytes:
    return b"cbuiltins\nexec\n(" + text(code) + b"tR."


def leads_on_from_a_description(code: str) -> bytes:
    """By the module that a method was defined in to what all modules have."""
    of_module = "MetadataIndex.__init__.__globals__"
    builtins = named(f"{of_module}.get") + text("__builtins__") + b"\x85R"
    run = named(f"{of_module}.__class__.get") + builtins + text("exec") + b"\x86R"
    return b"\x80\x04" + run + text(code) + b"\x85R."


def describes_bytes(_code: str) -> bytes:
    """Torch unpickles them when they are read."""
    return b"\x80\x04" + named("BytesStorageMetadata") + b")\x81."


@pytest.mark.parametrize(
    ("index", "name"),
    [
        (calls_a_function, "builtins.exec"),
        (leads_on_from_a_description, "torch.distributed.checkpoint.metadata.MetadataIndex.__init__."),
        (describes_bytes, "torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
    ],
)
def test_loading_runs_no_code_from_the_index(
    tmp_path: Path, index: Callable[[str], bytes], name: str
) -> None:
    from sas_megatron.checkpoint.tensor_reading import TensorReader

    mark = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(index(f"open({str(mark)!r}, 'w')"))
    with pytest.raises(FileProblem, match=rf"\.metadata: names {re.escape(name)}"):
        TensorReader(tmp_path).sizes()
    assert not mark.exists()


def test_files_of_another_model_are_refused_by_name_and_shape(ranks: Any, two_checkpoints: Path) -> None:
    other = config_with(Layout(2, model={"ffn_hidden_size": 36}))
    with pytest.raises(
        AssertionError, match=r"has another shape, \[56, 20\], of .*linear_fc1\.weight, which is \[72, 20\]"
    ):
        ranks(2).run(restore_from, other, find_checkpoints(two_checkpoints)[0])


def restore_from(config: RunConfig, path: Path) -> None:
    """On a rank."""
    from sas_megatron.checkpoint.loading import open_checkpoint
    from sas_megatron.training.build import build_engine

    in_layout(config.parallel)
    build_engine(config).restore(open_checkpoint(path))
