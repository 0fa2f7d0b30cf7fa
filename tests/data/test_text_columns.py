"""The text column in every type and nesting, names that are not UTF-8, and damaged Arrow and Parquet."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.data.documents import stream_documents
from sas_megatron.data.token_files import load_manifest
from sas_megatron.scaling.study.study_table import read_table
from tests.conftest import ROOT
from tests.data.damaged_files import TEXTS, text_columns, write_arrow, write_table
from tests.selection import cases

READ = [text for text in TEXTS if text]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_text_is_read_from_every_type_of_strings_and_bytes(tmp_path: Path, kind: str) -> None:
    columns = text_columns()
    struct = columns.pop("struct")
    columns["fixed_size_binary"] = pa.array([b"ab", None, b"\xc3\xa9"], pa.binary(2))
    deep = pa.array([{"text": {"en": text}} for text in TEXTS])
    for name, column in columns.items():
        path = tmp_path / f"{name}.{kind}"
        table = pa.table({"text": column})
        if kind == "arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
        elif "view" in name:
            continue  # pyarrow does not write views to Parquet
        else:
            pq.write_table(table, path)
        assert list(stream_documents([path])) == (["ab", "é"] if "fixed" in name else READ)
    table = pa.table({"meta": struct, "meta.text": ["a"] * 5, "meta.x": ["b"] * 5, "deep": deep})
    path = tmp_path / f"nested.{kind}"
    for names, column, expected in (
        (["meta", "deep"], "meta.text", READ),
        (["meta", "deep"], "deep.text.en", READ),
        (["meta", "meta.text"], "meta.text", ["a"] * 5),
        (["meta", "meta.x"], "meta.x", ["b"] * 5),
    ):
        chosen = table.select(names)
        if kind == "arrow":
            path.write_bytes(write_table(chosen))
        else:
            pq.write_table(chosen, path)
        assert list(stream_documents([path], text_column=column)) == expected


def test_text_is_read_from_inner_objects_of_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"meta": {"text": "a"}}, {"meta": None}, {"meta": {"text": None}}, {"meta.text": "b", "meta": 1}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(stream_documents([path], text_column="meta.text")) == ["a", "b"]
    for row in ({"meta": {}}, {"meta": "text"}, {"met": {"text": "a"}}):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(FieldError, match=r"text_column=meta\.text: .*line 1 has no such column"):
            list(stream_documents([path], text_column="meta.text"))


def test_columns_that_are_missing_doubled_or_of_other_types_are_named(tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array([{"text": 1}])], names=["t", "t", "meta"])
    for path in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        if path.suffix == ".parquet":
            pq.write_table(table, path)
        else:
            path.write_bytes(write_table(table))
        for column, message in (
            ("t", "has 2 such columns; rename all but one"),
            ("meta", "is of type struct<text: int64> in .*, not string"),
            ("meta.text", "is of type int64 in .*, not string; name a column of strings or of bytes"),
            ("text", r"has no such column; its columns are t, t, meta\.text; name"),
        ):
            with pytest.raises(FieldError, match=message):
                list(stream_documents([path], text_column=column))


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    wrong = pa.array([b"fine", b"ab\xff"])
    strings = wrong.view(pa.string())
    path = tmp_path / "a.arrow"
    for column, place in (
        (wrong, "row 1"),
        (wrong.cast(pa.binary_view()), "row 1"),
        (strings, "row 1"),
        (pa.DictionaryArray.from_arrays(pa.array([1, 0, 1]), strings, safe=False), "dictionary entry 1"),
    ):
        path.write_bytes(write_arrow(column, stream=True))
        with pytest.raises(FileProblem, match=rf"byte offset 2 of the text in {place} \(0xff\)"):
            list(stream_documents([path]))


DAMAGE = [("arrow", 19), ("parquet", 3)]


@pytest.mark.parametrize(("kind", "stride"), cases([*DAMAGE, ("arrow", 1), ("parquet", 1)], default=DAMAGE))
def test_damaged_files_never_end_the_process(kind: str, stride: int) -> None:
    command = [sys.executable, "-m", "tests.data.damaged_files", kind, str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["others"] == []
    assert counts["refused"] > 100
    assert counts["read"] > 100, "damage in another place changes a text"


def test_negative_offsets_are_refused(tmp_path: Path) -> None:
    data = bytearray(write_arrow(pa.array(["abc", "defg"]), stream=True))
    offsets = b"".join(offset.to_bytes(4, "little") for offset in (0, 3, 7))
    place = data.index(offsets) + 4
    data[place : place + 4] = (-(1 << 30)).to_bytes(4, "little", signed=True)
    path = tmp_path / "damaged_stream.arrow"
    path.write_bytes(data)
    script = "import sys; from sas_megatron.cli.main import main; main()"
    arguments = ["tokenizer", "train", path, "--output", tmp_path / "t.model"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, "not a segmentation fault"
    assert f"{path}: cannot be read as Arrow: it is damaged or truncated (" in done.stderr


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "txt", "arrow", "parquet"])
def test_names_that_are_not_utf8_are_accepted(tokenizer_path: Path, tmp_path: Path, ending: str) -> None:
    named = tmp_path / os.fsdecode(b"\xff\xe9." + ending.encode())
    plain = tmp_path / f"plain.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": ["alpha beta"]}), plain)
    elif ending == "arrow":
        plain.write_bytes(write_arrow(pa.array(["alpha beta"]), stream=False))
    else:
        text = "alpha beta" if ending == "txt" else '{"text": "alpha beta"}\n'
        plain.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    plain.rename(named)
    prefix = tmp_path / "tokens"
    arguments = [str(named), "--tokenizer", str(tokenizer_path), "--output", str(prefix), "--workers", "1"]
    done = CliRunner().invoke(cli, ["data", "prepare", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert load_manifest(prefix).sources[0].path == str(tmp_path / rf"\xff\xe9.{ending}")
    assert list(stream_documents([tmp_path / os.fsdecode(b"\xff\xe9." + ending.encode())])) == ["alpha beta"]


def test_damaged_table_of_a_study_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.parquet"
    metadata = {"study": json.dumps({"schema_version": 2, "name": "a", "baseline": "b", "remarks": []})}
    for table, message in (
        (pa.table({"run": ["a"]}).replace_schema_metadata({"study": "{"}), "cannot be read"),
        (pa.table({"run": ["a"]}).replace_schema_metadata(metadata), "cannot be read"),
        (pa.table({"other": ["a"]}).replace_schema_metadata(metadata), "cannot be read"),
        (pa.table({"run": pa.array([b"\xff"]).view(pa.string())}), "cannot be read"),
        (pa.table({"run": ["a"]}), "has schema version None, not 1 or 2 or 3 or 4, of a study's table"),
    ):
        pq.write_table(table, path)
        with pytest.raises(FileProblem, match=rf"study\.parquet: {message}"):
            read_table(path)
