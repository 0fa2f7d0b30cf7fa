"""Tables as columns of text: CSV, TSV and semicolon-separated text, JSON lines and Parquet, by content."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from sas_megatron.config.errors import FileProblem, translate_os_errors

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
LARGEST_FILE = 2**30
# First bytes of files that are often given in place of a table.
_OTHER_FORMATS = {
    b"PK\x03\x04": ("is a spreadsheet or another archive", "save the sheet as CSV"),
    b"\xd0\xcf\x11\xe0": ("is a spreadsheet", "save the sheet as CSV"),
    b"\x1f\x8b": ("is compressed", "decompress it"),
}
_PARQUET = b"PAR1"
# UTF-32 first, since its mark begins with that of UTF-16.
_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Table:
    """Columns of text by name, and the place of each row for messages, such as "line 5"."""

    columns: Mapping[str, list[str]]
    places: list[str]


def load_table(path: str | Path, *, wanted: Collection[str]) -> Table:
    """Read a table.

    Args:
        path: The file.
        wanted: Names of columns, by which the separator of a text file is recognized.

    Raises:
        FileProblem: The file cannot be read or is not a table.
    """
    with (
        translate_os_errors(path, problem="cannot be read", remedy="name a table of points"),
        open(path, "rb") as file,
    ):
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise FileProblem(path, "is larger than 1 GiB", "name a table of points")
    for signature, (problem, remedy) in _OTHER_FORMATS.items():
        if data.startswith(signature):
            raise FileProblem(path, problem, remedy)
    if data.startswith(_PARQUET):
        return _load_parquet(path, data)
    text = _decode(path, data)
    if text.lstrip().startswith("{"):
        return _load_json_lines(path, text)
    if text.lstrip().startswith("["):
        raise FileProblem(path, "is a JSON array", "write one JSON object per line")
    return _load_separated(path, text, wanted)


def _decode(path: str | Path, data: bytes) -> str:
    encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise FileProblem(path, f"is not a text file ({error})", "save it as UTF-8 text") from None
    if "\0" in text:
        raise FileProblem(path, "is not a text file (it contains zero bytes)", "save it as UTF-8 text")
    return text


def _load_separated(path: str | Path, text: str, wanted: Collection[str]) -> Table:
    first = next((line for line in io.StringIO(text, newline="") if line.strip()), "")
    headers = {separator: _split(first, separator) for separator in SEPARATORS}
    separator = max(headers, key=lambda each: (len(set(headers[each]) & set(wanted)), len(headers[each])))
    rows, places = [], []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    while True:
        try:
            fields = [field.strip() for field in next(reader)]
        except StopIteration:
            break
        except csv.Error as error:
            raise FileProblem(
                path, f"line {reader.line_num}: is not a row of a table ({error})", "correct its quotes"
            ) from None
        if not any(fields):
            continue
        if header is None:
            header = _trim(fields, 0)
            _check_names(path, f"line {reader.line_num}", header)
            continue
        fields = _trim(fields, len(header))
        if len(fields) > len(header):
            raise FileProblem(
                path,
                f"line {reader.line_num}, column {len(header) + 1}: has {len(fields)} fields separated by "
                f"{SEPARATORS[separator]}, but the first line has {len(header)}",
                "write numbers with a decimal point and without thousands separators, and quote other values",
            )
        rows.append(fields + [""] * (len(header) - len(fields)))
        places.append(f"line {reader.line_num}")
    names = header or []
    return Table({name: [row[column] for row in rows] for column, name in enumerate(names) if name}, places)


def _split(line: str, separator: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]
    except csv.Error:
        return []


def _trim(fields: list[str], length: int) -> list[str]:
    """Remove empty fields at the end, which spreadsheets add, down to a length."""
    while len(fields) > length and not fields[-1]:
        fields = fields[:-1]
    return fields


def _check_names(path: str | Path, place: str, names: Collection[str]) -> None:
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        columns = [str(number) for number, name in enumerate(names, start=1) if name == twice[0]]
        raise FileProblem(
            path,
            f"{place}: the name {twice[0]} occurs twice (columns {' and '.join(columns)})",
            "rename or remove one of them",
        )


def _load_json_lines(path: str | Path, text: str) -> Table:
    rows: list[dict[str, str]] = []
    places = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number}"
        try:
            row = json.loads(line, object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise FileProblem(path, f"{place}: is not JSON ({error})", "write one object per line") from None
        if not line.lstrip().startswith("{"):
            raise FileProblem(path, f"{place}: is not a JSON object", "write one object per line")
        _check_names(path, place, [name for name, _ in row])
        rows.append({name: _to_text(value) for name, value in row})
        places.append(place)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table({name: [row.get(name, "") for row in rows] for name in names}, places)


def _load_parquet(path: str | Path, data: bytes) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
        table.validate(full=True)  # reading values of damaged arrays could end the process
        _check_names(path, "its schema", table.schema.names)
        columns = {
            name: [_to_text(value) for value in table.column(name).to_pylist()] for name in table.schema.names
        }
    # pyarrow raises other errors for damaged files, too.
    except (OSError, ValueError, OverflowError, MemoryError, pa.ArrowException) as error:
        problem = f"is not a readable Parquet file ({' '.join(str(error).split())})"
        raise FileProblem(path, problem, "write it again") from None
    return Table(columns, [f"row {number}" for number in range(1, table.num_rows + 1)])


def _to_text(value: object) -> str:
    return "" if value is None else str(value)
