"""Tests of the built-in corpus: the standard library, the same on every call."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.data.corpus import (
    builtin_corpus,
    hash_documents,
    hash_order,
    resolve_sources,
    user_cache_folder,
)

MAX_BYTES = 200_003


def test_corpus_is_deterministic_and_bounded_and_matches_its_record(tmp_path: Path) -> None:
    first, second = (builtin_corpus(tmp_path / name, max_bytes=MAX_BYTES) for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    table = pq.read_table(first)
    texts, paths = table["text"].to_pylist(), table["path"].to_pylist()
    assert paths == sorted(paths, key=hash_order)
    assert MAX_BYTES / 4 < sum(len(text.encode()) for text in texts) <= MAX_BYTES
    for text, path in zip(texts, paths, strict=True):
        assert Path(sysconfig.get_paths()["stdlib"], path).read_bytes() == text.encode()
    record = json.loads(first.with_suffix(".json").read_text())
    assert record["sha256"] == hash_documents(paths, texts)
    assert record["num_documents"] == len(texts)


def test_complete_corpus_is_reused_and_damaged_corpus_is_rewritten(tmp_path: Path) -> None:
    path = builtin_corpus(tmp_path, max_bytes=MAX_BYTES)
    written = path.stat().st_mtime_ns
    assert builtin_corpus(tmp_path, max_bytes=MAX_BYTES).stat().st_mtime_ns == written
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert builtin_corpus(tmp_path, max_bytes=MAX_BYTES).read_bytes() == content


def test_cache_folder_follows_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / "sas_megatron"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache_folder() == Path.home() / ".cache" / "sas_megatron"


@pytest.mark.parametrize("value", [None, ""])
def test_a_user_without_a_home_folder_is_told_to_name_a_cache_folder(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    with pytest.raises(FieldError, match=r"^XDG_CACHE_HOME=: must name .*; set it to a writable folder"):
        builtin_corpus()


def test_files_that_the_corpus_leaves_out_are_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = tmp_path / "lib"
    (library / "site-packages").mkdir(parents=True)
    for name, content in (("a.py", b"a = 1"), ("b.py", b""), ("c.py", b"\xff"), ("d.py", b"\xe9")):
        (library / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):  # also when the corpus exists already
        (path,) = resolve_sources(["builtin"])
        assert pq.read_table(path)["path"].to_pylist() == ["a.py"]
        (message,) = caplog.messages
        assert "files that are not UTF-8 (2)" in message
        assert "empty files (1)" in message
        caplog.clear()


def test_other_sources_are_unchanged() -> None:
    assert resolve_sources(["a.txt", "./builtin"]) == ["a.txt", "./builtin"]


def test_error_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileProblem, match=r"cannot be written \(.*\); set XDG_CACHE_HOME"):
        builtin_corpus(tmp_path / "file", max_bytes=MAX_BYTES)
