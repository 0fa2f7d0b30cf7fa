"""Tests that a document above the limit is refused before it is read completely, in every format."""

from __future__ import annotations

import gzip
import inspect
import json
import random
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from sas_megatron.cli.data import document_limit
from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FieldError
from sas_megatron.data.documents import DEFAULT_MAX_DOCUMENT_BYTES, stream_documents
from sas_megatron.data.prepare import prepare_token_files
from tests.conftest import ROOT
from tests.selection import exhaustive
from tests.small_data import SmallData

LIMIT = 1000
FORMATS = ["txt", "txt.gz", "jsonl", "jsonl.zst", "parquet", "arrow", "dictionary.arrow", "views.arrow"]


def write(folder: Path, ending: str, texts: list[str]) -> Path:
    """Write texts to a file of a format; a text file has only the last of them."""
    path = folder / f"texts.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif ending.endswith("arrow"):
        array = pa.array(texts)
        if ending.startswith("dictionary"):
            array = pa.array([*texts, texts[-1]]).dictionary_encode()
        if ending.startswith("views"):
            array = array.cast(pa.string_view())
        with (
            pa.OSFile(str(path), "wb") as sink,
            pa.ipc.new_file(sink, pa.schema([("text", array.type)])) as file,
        ):
            file.write(pa.record_batch({"text": array}))
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        content = texts[-1].encode() if ending.startswith("txt") else lines.encode()
        with pa.output_stream(path, compression="detect") as sink:
            sink.write(content)
    return path


@pytest.mark.parametrize("ending", FORMATS)
def test_the_limit_is_that_of_one_document(tmp_path: Path, ending: str) -> None:
    fitting = ["ä" * 400, "b" * LIMIT] if "jsonl" not in ending else ["c" * 700, "d" * 900]
    assert (
        list(stream_documents([write(tmp_path, ending, fitting)], max_document_bytes=LIMIT))[-1]
        == fitting[-1]
    )
    path = write(tmp_path, ending, ["short", "ä" * 501])
    with pytest.raises(FieldError) as raised:
        list(stream_documents([path], max_document_bytes=LIMIT))
    where = f"{path}, line 2" if "jsonl" in ending else path
    assert str(raised.value) == (
        f"max_document_bytes=1000: {where} has a larger document; split it into several documents, or raise "
        "this limit"
    )


@pytest.mark.parametrize("ending", ["txt.gz", "jsonl.gz"])
def test_text_beyond_the_limit_is_not_decompressed(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"texts.{ending}"
    content = gzip.compress(random.Random(1).randbytes(10_000_000).hex().encode(), compresslevel=1)
    path.write_bytes(content[: len(content) // 2])  # reading all of it would report damage
    with pytest.raises(FieldError, match="has a larger document"):
        list(stream_documents([path], max_document_bytes=LIMIT))


def test_a_copied_entry_of_a_dictionary_takes_no_more_than_a_batch(tmp_path: Path) -> None:
    text = "x" * 100_000
    array = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int16()), pa.array([text]))
    path = tmp_path / "texts.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("text", array.type)])) as file:
        file.write(pa.record_batch({"text": array}))
    before = pa.total_allocated_bytes()
    documents = iter(stream_documents([path]))
    assert next(documents) == text
    assert pa.total_allocated_bytes() - before < 10_000_000, "decoded, all rows take 500 MB"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_the_limit_is_an_option(small_data: SmallData, tmp_path: Path, command: str) -> None:
    path = write(tmp_path, "txt", ["some words of a text " * 60])
    options = ("--tokenizer", small_data.tokenizer, "--output", tmp_path / "out")
    arguments = (
        ("data", "prepare", path, *options)
        if command == "prepare"
        else ("tokenizer", "train", path, "--vocab-size", 270, "--output", tmp_path / "out.model")
    )
    refused = invoke(*arguments, "--max-document-bytes", LIMIT)
    assert isinstance(refused.exception, FieldError)
    assert "max_document_bytes=1000: " in str(refused.exception)
    assert list(tmp_path.iterdir()) == [path]
    assert invoke(*arguments, "--max-document-bytes", 2000).exit_code == 0


def test_the_default_of_the_commands_is_that_of_the_readers() -> None:
    @document_limit
    def command(max_document_bytes: int) -> None: ...

    (option,) = command.__click_params__  # type: ignore[attr-defined]
    assert option.default == DEFAULT_MAX_DOCUMENT_BYTES
    parameters = inspect.signature(prepare_token_files).parameters
    assert parameters["max_document_bytes"].default == DEFAULT_MAX_DOCUMENT_BYTES


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30))


@exhaustive
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_document_of_gigabytes_in_a_small_file_is_refused_in_bounded_memory(
    small_data: SmallData, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"texts.{ending}.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(3000):
            file.write(b"a" * 10**6)
    arguments = ["data", "prepare", path, "--tokenizer", small_data.tokenizer, "--output", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-m", "sas_megatron", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit_memory,
    )
    assert done.returncode == 2, done.stderr
    assert "max_document_bytes=134217728: " in done.stderr
    assert "Traceback" not in done.stderr
