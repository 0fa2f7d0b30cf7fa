"""Tests that damaged sample indices are built again, and that a failed build leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sas_megatron.io.file_records import describe_file
from tests.data.test_index_cache import config_of, read_on_nodes_of_two, read_samples
from tests.full_disk import no_file_longer_than
from tests.rank_pool import in_layout
from tests.selection import cases
from tests.small_data import SmallData


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def find_array(folder: Path, kind: str) -> Path:
    """Return the first array of a kind, such as `shuffle_index`."""
    return sorted(folder.glob(f"*-{kind}.npy"))[0]


def overwrite_one_value(folder: Path) -> None:
    path = find_array(folder, "shuffle_index")
    content = bytearray(path.read_bytes())
    content[-4:] = bytes(4)
    path.write_bytes(content)


def cut(folder: Path) -> None:
    path = find_array(folder, "sample_index")
    path.write_bytes(path.read_bytes()[:-9])


def swap_two_values(folder: Path) -> None:
    path = find_array(folder, "dataset_index")  # of the blend
    content = path.read_bytes()
    at = content.index(b"\0\0\1\0", 128)
    path.write_bytes(content[:at] + b"\1\0\0\0" + content[at + 4 :])


def remove_array(folder: Path) -> None:
    find_array(folder, "document_index").unlink()


def add_file(folder: Path) -> None:
    (folder / "more.npy").write_bytes(b"")


def remove_records(folder: Path) -> None:
    """Make the folder one of an earlier version, which recorded no checksums."""
    (folder / "files.json").unlink()


def empty_records(folder: Path) -> None:
    (folder / "files.json").write_text('{"schema_version": 1, "files": {}}')


def garble_records(folder: Path) -> None:
    (folder / "files.json").write_text("[" * 100_000)


def insert_pickle(folder: Path) -> None:
    path = find_array(folder, "document_index")
    path.write_bytes(pickle.dumps(Payload(folder.parents[1] / "executed")))
    tree = json.loads((folder / "files.json").read_text())
    tree["files"][path.name] = vars(describe_file(path))
    (folder / "files.json").write_text(json.dumps(tree))


def become_a_file(folder: Path) -> None:
    folder.rename(folder.parent.parent / "moved")
    folder.write_text("in the way")


def become_a_link_to_nothing(folder: Path) -> None:
    folder.rename(folder.parent.parent / "moved")
    folder.symlink_to("nothing")


DAMAGES = [
    overwrite_one_value,
    cut,
    swap_two_values,
    remove_array,
    add_file,
    remove_records,
    empty_records,
    garble_records,
    insert_pickle,
    become_a_file,
    become_a_link_to_nothing,
]


def read_and_log(config: Any, saved: Path) -> tuple[str, list[str]]:
    """Return the digest of all samples and the logged warnings."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sas_megatron.data.index_cache")
    logger.addHandler(handler)
    try:
        return read_samples(config, saved, True), messages
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    "damage",
    cases(DAMAGES, default=[overwrite_one_value, cut, remove_records, insert_pickle, become_a_file]),
)
def test_a_damaged_index_is_built_again_and_samples_do_not_change(
    ranks: Any, small_data: SmallData, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    config, saved = config_of(small_data, tmp_path / "cache"), tmp_path / "saved"
    (expected,) = ranks(1).run(read_and_log, config, saved)
    (folder,) = (tmp_path / "cache").iterdir()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    ((digest, messages),) = ranks(1).run(read_and_log, config, saved)
    assert digest == expected[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert not (tmp_path / "executed").exists()
    if not damage.__name__.startswith("become"):
        assert messages == [
            f"{folder}: the sample indices are damaged, or have no checksums, and are built again"
        ]


def test_a_node_with_a_damaged_copy_gets_another(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    expected = ranks(4).run(read_on_nodes_of_two, small_data, tmp_path)
    (folder,) = (tmp_path / "disk_1" / "cache").iterdir()
    overwrite_one_value(folder)
    (tmp_path / "saved").unlink()
    assert ranks(4).run(read_on_nodes_of_two, small_data, tmp_path) == expected
    assert not (tmp_path / "saved").exists(), "the intact indices of rank 0 are not built again"


def read_on_full_disk(small_data: SmallData, folder: Path, is_full_for_copies: bool) -> str:
    """Read samples while no index may be longer than 4 kB on all nodes, or only on those of ranks 2 and 3."""
    import torch.distributed as dist

    from sas_megatron.data import index_cache

    in_layout(config_of(small_data, folder / "cache").parallel)
    if is_full_for_copies and dist.get_rank() < 2:
        return read_on_nodes_of_two(small_data, folder)
    translate = index_cache._writing

    # The limit applies while indices are written: the rendezvous store of the test's ranks is a file too.
    @contextlib.contextmanager
    def write_on_full_disk(path: Path) -> Iterator[None]:
        with translate(path), no_file_longer_than(4096):
            yield

    with mock.patch.object(index_cache, "_writing", write_on_full_disk):
        return read_on_nodes_of_two(small_data, folder)


@pytest.mark.parametrize(("is_full_for_copies", "disk"), [(False, "disk_0"), (True, "disk_1")])
def test_a_full_disk_is_reported_on_every_rank_and_nothing_stays_there(
    ranks: Any, small_data: SmallData, tmp_path: Path, is_full_for_copies: bool, disk: str
) -> None:
    with pytest.raises(AssertionError) as failure:
        ranks(4).run(read_on_full_disk, small_data, tmp_path, is_full_for_copies)
    message = f"data.index_cache={tmp_path / disk / 'cache'}: cannot be written on {socket.gethostname()} ("
    assert str(failure.value).count(message) == 4
    assert "name a writable folder with enough space for the sample indices" in str(failure.value)
    assert list((tmp_path / disk / "cache").iterdir()) == []
