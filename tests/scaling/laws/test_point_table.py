"""Tables of points: formats, names of columns, and rows that a spreadsheet damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.scaling.laws.point_table import parse_columns, read_points

ROWS = [(1e7, 1e9, 3.5), (3e7, 2e9, 3.25), (9e7, 4e9, 3.125)]
CSV = "params,tokens,loss\n" + "".join(f"{n:.0f},{d:.0f},{loss}\n" for n, d, loss in ROWS)

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: str | bytes) -> Path:
        path = tmp_path / "points"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def parquet() -> bytes:
    params, tokens, loss = (list(values) for values in zip(*ROWS, strict=True))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"params": params, "tokens": tokens, "loss": loss, "seed": [1, 2, None]}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


FORMATS = {
    "commas": CSV,
    "byte order mark": "\ufeff" + CSV,
    "Windows lines": CSV.replace("\n", "\r\n"),
    "old Macintosh lines": CSV.replace("\n", "\r"),
    "tabs": CSV.replace(",", "\t"),
    "semicolons": CSV.replace(",", ";"),
    "UTF-16 with tabs": CSV.replace(",", "\t").encode("utf-16"),
    "UTF-32": CSV.encode("utf-32"),
    "empty columns and rows": CSV.replace("\n", ",,\n") + ",,,,\n\n",
    "quoted": CSV.replace("10000000,", '"10000000",'),
    "JSON lines": "".join(
        json.dumps({"loss": loss, "note": "a, b", "params": n, "tokens": int(d)}) + "\n\n"
        for n, d, loss in ROWS
    ),
    "Parquet": parquet(),
}


@pytest.mark.parametrize("content", FORMATS.values(), ids=FORMATS)
def test_formats_hold_the_same_points(content: str | bytes, write: Write) -> None:
    points = read_points(write(content))
    np.testing.assert_array_equal(np.stack([points.params, points.tokens, points.loss], axis=1), ROWS)
    assert points.flops is None
    assert points.runs is None


def test_columns_are_chosen_by_name(write: Write) -> None:
    path = write(
        "Model Size,D,loss,C,id,params\n1e7,1e9,3.5,6e16,a,7\n3e7,2e9,3.2,3.6e17,b,7\n3e7,3e9,3.1,5e17,b,7\n"
    )
    columns = parse_columns("params=Model Size,tokens=D, flops = C,run=id")
    points = read_points(path, columns=columns)
    assert points.params.tolist() == [1e7, 3e7, 3e7]
    assert points.compute.tolist() == [6e16, 3.6e17, 5e17]
    assert points.runs is not None
    assert points.runs.tolist() == [0, 1, 1]


def test_names_of_columns_may_contain_commas_and_equals_signs() -> None:
    assert parse_columns("params=N, in millions,loss=L=log") == {"params": "N, in millions", "loss": "L=log"}


@pytest.mark.parametrize("text", ["", "params", "N=params", "params=", "params=a,params=b", "x,params=a"])
def test_invalid_assignments_of_columns_are_refused(text: str) -> None:
    with pytest.raises(FieldError, match="must assign a column of the table"):
        parse_columns(text)


def test_unknown_column_is_refused_with_the_columns_found(write: Write) -> None:
    with pytest.raises(FieldError, match=r"--columns=loss=Loss: .* has no column Loss, it contains params"):
        read_points(write(CSV), columns={"loss": "Loss"})
    with pytest.raises(FileProblem) as caught:
        read_points(write(CSV.replace("tokens,loss", "D,L")))
    assert "has no column tokens, loss" in str(caught.value)
    assert "it contains params, D, L; name its columns with --columns tokens=NAME" in str(caught.value)


DAMAGED = {
    "thousands separators": (
        CSV.replace("10000000,", "6,795,600,349.3,"),
        "line 2, column 4: has 6 fields separated by commas, but the first line has 3; write numbers with a",
    ),
    "decimal commas": (CSV.replace("3.25", "3,25"), "line 3, column 4: has 4 fields separated by commas"),
    "decimal commas and semicolons": (
        CSV.replace(",", ";").replace("3.25", "3,25"),
        "line 3: loss=3,25: must be a positive number; write it with a decimal point and without thousands",
    ),
    "quoted thousands separators": (
        CSV.replace("10000000,", '"10,000,000",'),
        "line 2: params=10,000,000: must be a positive number; write it with a decimal point",
    ),
    "JSON decimal comma": (
        '{"params": 1e7, "tokens": 1e9, "loss": "3,5"}',
        "line 1: loss=3,5: must be a positive number; write it with a decimal point",
    ),
    "a name twice": (
        CSV.replace("params,tokens", "params,params"),
        "line 1: the name params occurs twice (columns 1 and 2); rename or remove one of them",
    ),
    "a JSON name twice": (
        '{"params": 1e7, "tokens": 1e9, "loss": 3.5, "loss": 3.4}',
        "line 1: the name loss occurs twice (columns 3 and 4)",
    ),
    "a row twice": (
        CSV + CSV.splitlines()[2] + "\n",
        "line 5: repeats line 3; remove it, or add a column, such as seed, that distinguishes the two runs",
    ),
    "not a number": (
        CSV.replace("3.25", "nan"),
        "line 3: loss=nan: must be a positive number; remove diverged",
    ),
    "infinite": (CSV.replace("3.25", "inf"), "line 3: loss=inf: must be a positive number"),
    "a boolean": (
        '{"params": true, "tokens": 1e9, "loss": 3}',
        "line 1: params=True: must be a positive number",
    ),
    "null": (
        '{"params": null, "tokens": 1e9, "loss": 3}',
        "line 1: params=nothing: must be a positive number",
    ),
    "a huge integer": (CSV.replace("10000000", "9" * 400), "must be a positive number"),
    "a huge JSON integer": ('{"params": %s, "tokens": 1, "loss": 3}' % ("9" * 9000), "line 1: is not JSON"),
    "an overflow of 6ND": (
        CSV.replace("10000000", "1e200"),
        "line 2: params=1e200: must be between 1e-60 and",
    ),
    "nested JSON": ("{" + '"a":[' * 100_000, "line 1: is not JSON"),
    "a JSON array": ("[1, 2]", "is a JSON array; write one JSON object per line"),
    "a JSON number": ('{"params": 1, "tokens": 1, "loss": 3}\n7\n', "line 2: is not a JSON object"),
    "header only": ("params,tokens,loss\n", "has no points; add a line for each run"),
    "empty": ("", "has no column params, tokens, loss"),
    "a byte order mark only": ("\ufeff", "has no column params, tokens, loss"),
    "Latin-1": (CSV.encode() + b"\xe9", "is not a text file"),
    "UTF-16 without a mark": (CSV.encode("utf-16-le"), "is not a text file (it contains zero bytes)"),
    "half of UTF-16": (CSV.encode("utf-16")[:-1], "is not a text file"),
    "an open quote": (CSV + '"1e7,1e9', "line 5: is not a row of a table (unexpected end of data)"),
    "a spreadsheet": (b"PK\x03\x04rest", "is a spreadsheet or another archive; save the sheet as CSV"),
    "gzip": (b"\x1f\x8brest", "is compressed; decompress it"),
    "damaged Parquet": (parquet()[:-20] + b"PAR1", "is not a readable Parquet file"),
    "no name of a run": (CSV.replace("loss\n", "loss,run\n"), "line 2: run=nothing: must be a name"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_tables_end_in_one_message(content: str | bytes, message: str, write: Write) -> None:
    with pytest.raises(UserError) as caught:
        read_points(write(content))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_equal_points_of_two_variants_or_seeds_are_kept(write: Write) -> None:
    text = "params,tokens,loss,variant,seed\n1e7,1e9,3,a,1\n1e7,1e9,3,b,1\n1e7,1e9,3,a,2\n"
    assert len(read_points(write(text), variant="a")) == 2


def test_folder_and_missing_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(FileProblem, match="cannot be read"):
            read_points(path)
