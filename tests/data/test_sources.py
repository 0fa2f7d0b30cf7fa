"""What a walk or a reader of documents leaves out, or would take twice, is counted in what is printed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FileProblem
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.sources import find_source_files, find_sources
from sas_megatron.data.token_files import load_manifest


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(*sources: Path) -> list[str]:
    return [file.path.name for file in find_source_files(sources)]


def test_linked_folders_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = tmp_path / "corpus"
    write(corpus / "a.txt")
    write(tmp_path / "shared" / "b.txt")
    write(tmp_path / "shared" / "inner" / "c.txt")
    (corpus / "part2").symlink_to("../shared", target_is_directory=True)
    assert names(corpus) == ["a.txt", "b.txt", "c.txt"]
    assert caplog.messages == []
    (tmp_path / "shared" / "back").symlink_to(corpus, target_is_directory=True)
    (corpus / "part3").symlink_to("../shared/inner", target_is_directory=True)
    assert names(corpus) == ["a.txt", "b.txt", "c.txt"]
    assert caplog.messages == [f"{corpus}: left out folders linked to twice (2)"]


def test_a_file_named_twice_is_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = write(tmp_path / "a.txt")
    os.link(first, tmp_path / "hard.txt")
    (tmp_path / "soft.txt").symlink_to("a.txt")
    for sources in ([first, first], [first, tmp_path / "." / "a.txt"], [first, tmp_path / "hard.txt"]):
        assert names(*sources) == ["a.txt"]
        assert caplog.messages == [f"{sources[1]}: left out files named twice (1)"]
        caplog.clear()
    assert names(tmp_path / "soft.txt", tmp_path) == ["soft.txt"]
    assert caplog.messages == [f"{tmp_path}: left out files named twice (3)"]
    _, second = find_sources([first, tmp_path])
    assert second.files == ()


def test_hidden_files_and_unknown_endings_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", ".b.txt", ".git/c.txt", "d.png", "inner/.e.txt", "inner/f.csv"):
        write(tmp_path / name)
    assert names(tmp_path) == ["a.txt"]
    assert caplog.messages == [
        f"{tmp_path}: left out hidden files or folders (3), files of unknown endings (2)"
    ]


def test_links_to_nothing_and_pipes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt")
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for source in (pipe, tmp_path):
        with pytest.raises(FileProblem, match=r"pipe\.jsonl: is not a regular file; write"):
            find_source_files([source])
    pipe.unlink()
    (tmp_path / "part2").symlink_to("../unmounted")
    with pytest.raises(FileProblem, match=r"part2: is a link to a file or folder that does not"):
        find_source_files([tmp_path])


def test_empty_documents_are_counted(tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) + "\n" for text in ("a", "", None, "b", "")]
    documents = stream_documents([write(tmp_path / "a.jsonl", "".join(lines)), write(tmp_path / "b.txt", "")])
    assert (list(documents), documents.num_empty) == (["a", "b"], 4)
    assert (list(documents), documents.num_empty) == (["a", "b"], 4), "not the sum of two iterations"


def invoke(*arguments: object) -> Result:
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_prepare_and_tokenizer_print_what_they_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpus, model, prefix = tmp_path / "corpus", tmp_path / "t.model", tmp_path / "tokens"
    text = "def twice(number):\n    return 2 * number\n\n" * 40
    for number in range(3):
        write(corpus / f"{number}.py", f"# file {number}\n{text}")
    write(corpus / "empty.txt", "")
    write(corpus / ".hidden.txt")
    (corpus / "again.py").symlink_to("0.py")
    left_out = f"{corpus}: left out hidden files or folders (1), files named twice (1)"
    trained = invoke("tokenizer", "train", corpus, "--vocab-size", 300, "--output", model)
    assert "(1 empty documents left out)" in trained.output
    assert caplog.messages == [left_out]
    caplog.clear()
    prepared = invoke("data", "prepare", corpus, "--tokenizer", model, "--output", prefix, "--workers", 1)
    assert "3 documents" in prepared.output
    assert "(1 empty documents left out)" in prepared.output
    assert caplog.messages == [left_out]
    assert load_manifest(prefix).sources[0].num_files == 4
