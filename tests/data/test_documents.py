"""Tests of reading documents from every format, and of the errors for invalid files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import zstandard

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.data import documents as documents_module
from sas_megatron.data.documents import stream_documents, stream_text_batches
from sas_megatron.data.sources import find_source_files, fingerprint_files

TEXTS = ["one\n\ttwo  ", "\r\n\u2581é", "x" * 3001, "日本\0語", " "]


def write_parquet(path: Path, texts: list[str | None] = TEXTS, **options: object) -> Path:
    pq.write_table(pa.table({"number": range(len(texts)), "text": texts}), path, **options)
    return path


def json_lines(texts: list[str]) -> bytes:
    return "".join(
        json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(texts)
    ).encode()


def write_ipc(path: Path, texts: list[str], *, stream: bool, text_type: pa.DataType | None = None) -> Path:
    table = pa.table({"text": pa.array(texts).cast(text_type or pa.string())})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "jsonl.gz", "jsonl.zst"])
def test_json_lines_are_read_as_written(tmp_path: Path, ending: str) -> None:
    data = json_lines(TEXTS)
    if ending.endswith("gz"):  # two members, as written by tools that append
        data = gzip.compress(data[:40]) + gzip.compress(data[40:])
    elif ending.endswith("zst"):
        data = zstandard.compress(data)
    path = tmp_path / f"part.{ending}"
    path.write_bytes(data)
    assert list(stream_documents([path])) == TEXTS


def test_json_lines_may_have_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json_lines(TEXTS).replace(b"\n", b"\n\n") + b'{"text": "no newline"}')
    assert list(stream_documents([path])) == [*TEXTS, "no newline"]


@pytest.mark.parametrize("text_type", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
@pytest.mark.parametrize("stream", [False, True])
def test_arrow_files_and_streams_are_read_as_written(tmp_path: Path, stream: bool, text_type: object) -> None:
    arrow_type = pa.dictionary(pa.int32(), pa.string()) if text_type == "dictionary" else text_type
    path = write_ipc(tmp_path / "a.arrow", TEXTS, stream=stream, text_type=arrow_type)
    assert list(stream_documents([path])) == TEXTS


def test_feather_and_parquet_are_read_as_written(tmp_path: Path) -> None:
    feather = tmp_path / "a.feather"
    pyarrow.feather.write_feather(pa.table({"text": TEXTS}), feather)
    parquet = write_parquet(tmp_path / "b.parquet", row_group_size=2, compression="zstd")
    assert list(stream_documents([feather, parquet])) == TEXTS + TEXTS


def test_folder_of_mixed_formats_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name, text in [
        ("b/2.txt", "second"),
        ("b/10.md", "first"),
        ("a.txt", "zeroth"),
        (".hidden.txt", "no"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"fourth"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    write_parquet(tmp_path / "d.parquet", ["fifth", None, "", "sixth"])
    assert list(stream_documents([tmp_path])) == ["zeroth", "first", "second", "fourth", "fifth", "sixth"]


def test_batches_bound_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "BATCH_BYTES", 10_000)
    texts = [str(number) * 1000 for number in range(99)]
    write_parquet(tmp_path / "a.parquet", texts)
    write_ipc(tmp_path / "b.arrow", texts, stream=False)
    (tmp_path / "c.jsonl").write_bytes(json_lines(texts))
    batches = list(stream_text_batches(find_source_files([tmp_path])))
    assert max(batch.texts.nbytes for batch in batches) < 40_000
    assert [text for batch in batches for text in batch.texts.to_pylist()] == texts * 3
    reads = [batch.source_bytes_read for batch in batches]
    assert reads == sorted(reads)
    assert reads[-1] == sum(file.size_bytes for file in find_source_files([tmp_path]))


def test_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("same")
    before = fingerprint_files(find_source_files([path]))
    assert before == fingerprint_files(find_source_files([path]))
    path.write_text("other")
    assert before != fingerprint_files(find_source_files([path]))


def message_of(*sources: Path, text_column: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        list(stream_documents(sources, text_column=text_column))
    return str(caught.value)


def test_error_names_missing_files_and_unknown_endings(tmp_path: Path) -> None:
    absent = tmp_path / "absent.parquet"
    assert message_of(absent) == f"{absent}: does not exist; check the path"
    table = tmp_path / "table.csv"
    table.write_text("text\n")
    assert f"{table}: has an unknown file ending (.csv); known endings are .parquet, .arrow" in message_of(
        table
    )
    assert "sources: none given" in message_of()


def test_error_names_missing_columns_and_columns_of_other_types(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet")
    assert message_of(parquet, text_column="body") == (
        f"text_column=body: {parquet} has no such column; its columns are number, text; "
        "name the column with the text"
    )
    assert f"text_column=number: is of type int64 in {parquet}, not string" in message_of(
        parquet, text_column="number"
    )
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(json_lines(["a", "b"]) + b'{"body": "c", "id": 3}\n')
    assert f"{lines}, line 3 has no such column; its columns are body, id" in message_of(lines)
    assert f"text_column=id: is of type int in {lines}, line 1, not string" in message_of(
        lines, text_column="id"
    )


def test_error_names_damaged_files(tmp_path: Path) -> None:
    parquet = write_parquet(tmp_path / "a.parquet")
    parquet.write_bytes(parquet.read_bytes()[:-30])
    assert f"{parquet}: cannot be read as Parquet: it is damaged or truncated" in message_of(parquet)
    for stream in (False, True):
        arrow = write_ipc(tmp_path / f"{stream}.arrow", ["x" * 5000] * 7, stream=stream)
        arrow.write_bytes(arrow.read_bytes()[:9000])
        assert f"{arrow}: cannot be read as Arrow: it is damaged or truncated" in message_of(arrow)
    noise = tmp_path / "noise.arrow"
    noise.write_bytes(b"not arrow at all, but long enough")
    assert f"{noise}: cannot be read as Arrow" in message_of(noise)


@pytest.mark.parametrize("ending", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "other"])
def test_error_names_files_with_damaged_compression(tmp_path: Path, ending: str, damage: str) -> None:
    data = json_lines([f"{number} words {number * 7919}" for number in range(5000)])
    options = zstandard.ZstdCompressor(write_checksum=True)
    packed = bytearray(gzip.compress(data) if ending == "gz" else options.compress(data))
    if damage == "truncated":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 0xFF
    else:
        packed = bytearray(data)
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(packed)
    # A flipped byte may decompress to text that is not JSON, before the checksum is reached.
    assert str(path) in message_of(path)


def test_error_numbers_lines_that_are_not_json_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["a"]) + b'{"text": "cut')
    assert f"{path}, line 2: is not JSON (Unterminated string" in message_of(path)
    path.write_bytes(b'["a"]\n')
    assert f"{path}, line 1: is a list, not an object" in message_of(path)
    path.write_bytes(b'{"text": "\\ud800"}\n')
    assert f"{path}, line 1: has an unpaired surrogate" in message_of(path)


def test_error_locates_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes("é".encode() + b"ab\xffcd")
    assert f"{text}: has bytes that are not UTF-8 at byte offset 4 (0xff); convert it to UTF-8" in message_of(
        text
    )
    first = json_lines(["a"])
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(first + b'{"text": "\xe9"}\n')
    assert f"at byte offset {len(first) + 10} (0xe9)" in message_of(lines)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    assert f"at byte offset {len(first) + 10} of the uncompressed text (0xe9)" in message_of(packed)
    # Arrow's readers do not validate the bytes of string columns.
    wrong = pa.array([b"fine", b"ab\xff"]).cast(pa.binary()).view(pa.string())
    parquet = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": wrong}), parquet)
    assert f"{parquet}: has bytes that are not UTF-8 at byte offset 2 of the text in row 1" in message_of(
        parquet
    )


def test_corpus_without_text_is_an_error(tmp_path: Path) -> None:
    empty = tmp_path / "a.txt"
    empty.write_text("")
    nulls = write_parquet(tmp_path / "b.parquet", [None, ""])
    for source in (empty, nulls):
        assert message_of(source) == (
            f"sources={source}: have no documents, or only empty ones; name files with text in them"
        )
    folder = tmp_path / "folder"
    folder.mkdir()
    assert f"{folder}: has no documents" in message_of(folder)


def test_errors_are_user_errors() -> None:
    assert issubclass(FileProblem, UserError)
    assert issubclass(FieldError, UserError)
