"""Tests of atomic file writes and of the translation of OSError."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path

import pytest

from sas_megatron.config.errors import FieldError, FileProblem, translate_os_errors
from sas_megatron.io.files import make_folder, replace_file, save_file, write_file, write_files


@pytest.mark.parametrize("content", ["text …\n", b"\xff\x00"])
def test_file_has_exactly_the_given_content(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "new" / "file.txt"
    save_file(path, content, remedy="name another file")
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(path.parent.iterdir()) == [path]


def test_failed_block_keeps_previous_content_and_removes_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_file(path, "before")

    def fail_halfway() -> None:
        with replace_file(path) as temporary:
            assert temporary.parent == tmp_path
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_file_and_folder_are_synced_around_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        calls.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path else "file")
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    with replace_file(tmp_path / "file.txt") as temporary:
        temporary.write_text("text")
    assert calls == ["file", "rename", "folder"]


def test_no_file_is_replaced_when_one_of_several_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in ("first", "second", "third")]
    write_files(dict.fromkeys(paths, "before"))
    fsync, num_syncs = os.fsync, 0

    def fill_disk(descriptor: int) -> None:
        nonlocal num_syncs
        num_syncs += 1
        if num_syncs == len(paths):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_disk)
    with pytest.raises(OSError, match="No space left on device"):
        write_files(dict.fromkeys(paths, "after"))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("first", "second", "third"), "before"
    )


def test_file_instead_of_folder_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(NotADirectoryError):
            make_folder(path)
    path = tmp_path / "file" / "name"
    message = rf"^{path}: cannot be written \(Not a directory\); name another file$"
    with pytest.raises(FileProblem, match=message):
        save_file(path, "", remedy="name another file")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, "path: cannot be read (Permission denied); check it"),
        (errno.ENOENT, "path: does not exist; create it"),
        (errno.ENOSPC, "path: cannot be read (No space left on device); free disk space"),
        (errno.EDQUOT, "path: cannot be read (Disk quota exceeded); free disk space"),
    ],
)
def test_message_has_path_problem_reason_and_remedy(number: int, message: str) -> None:
    with (
        pytest.raises(FileProblem) as caught,
        translate_os_errors(
            "path",
            problem="cannot be read",
            remedy="check it",
            missing=("does not exist", "create it"),
            disk_full_remedy="free disk space",
        ),
    ):
        raise OSError(number, os.strerror(number), "/elsewhere")
    assert str(caught.value) == message


def test_error_without_reason_is_named_by_its_text_or_class() -> None:
    for error, reason in ((OSError("two\nlines"), "two lines"), (TimeoutError(), "TimeoutError")):
        with (
            pytest.raises(FileProblem) as caught,
            translate_os_errors("path", problem="fails", remedy="wait"),
        ):
            raise error
        assert str(caught.value) == f"path: fails ({reason}); wait"


def test_path_of_a_field_raises_a_field_error() -> None:
    build = functools.partial(FieldError, "data.index_cache")
    with (
        pytest.raises(FieldError) as caught,
        translate_os_errors("/cache", problem="cannot be written", remedy="name another", error_type=build),
    ):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    assert str(caught.value) == "data.index_cache=/cache: cannot be written (Permission denied); name another"


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(KeyError), translate_os_errors("path", problem="cannot be read", remedy="check it"):
        raise KeyError("name")
