"""The text column of Arrow data, found by its name, validated and converted to UTF-8; the text field of JSON.

Arrow's readers check neither the offsets of an array nor its UTF-8. Casting or slicing an array whose offsets
point outside of its buffers ends the process, so that every array is validated first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sas_megatron.config.errors import FieldError, FileProblem

_IS_TEXT = (
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary),
)


def find_text_column(schema: pa.Schema, text_column: str, path: Path) -> tuple[str, ...]:
    """Return the name of a column, followed by the names of fields of structs; `meta.text` is text in meta.

    Raises:
        FieldError: The file at `path` has no such column, several, or one that is neither of strings nor of
            bytes.
    """
    found = _resolve(list(schema), text_column)
    if not found:
        names = ", ".join(_list_names(schema)) or "none"
        raise FieldError(
            "text_column",
            text_column,
            f"{path} has no such column; its columns are {names}",
            "name the column with the text",
        )
    if len(found) > 1:
        raise FieldError(
            "text_column", text_column, f"{path} has {len(found)} such columns", "rename all but one"
        )
    fields = found[0]
    column_type = fields[-1].type
    if not any(is_type(_value_type(column_type)) for is_type in _IS_TEXT):
        raise FieldError(
            "text_column",
            text_column,
            f"is of type {column_type} in {path}, not string",
            "name a column of strings or of bytes in UTF-8",
        )
    return tuple(field.name for field in fields)


def find_value(row: Mapping[str, object], name: str) -> object:
    """Return the value of a field, or of a field of an inner object: `meta.text` is text in meta.

    Raises:
        KeyError: There is no such field.
    """
    if name in row:
        return row[name]
    for key, value in row.items():
        if name.startswith(f"{key}."):
            if value is None:
                return None
            if isinstance(value, dict):
                return find_value(value, name.removeprefix(f"{key}."))
    raise KeyError(name)


def convert_to_texts(
    column: pa.Array, names: Sequence[str], *, path: Path, first_row: int
) -> pa.LargeStringArray:
    """Return a column, or a field of its structs, as large strings after validating it.

    Args:
        column: The column as read from the file.
        names: The names that `find_text_column` returned.
        path: The file, for messages.
        first_row: The number of rows before this column, for messages.

    Raises:
        FileProblem: A text is not UTF-8.
        pa.ArrowInvalid: The array is damaged.
    """
    column.validate()  # sizes of buffers and lengths of fields
    for name in names[1:]:
        column = pc.struct_field(column, [name])
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    _validate(column, path=path, first_row=first_row)
    if pa.types.is_dictionary(column.type):
        column = pc.dictionary_decode(column)
    if not (pa.types.is_string(column.type) or pa.types.is_string_view(column.type)):
        # Bytes are not validated as UTF-8 by a view, in contrast to a cast, which does not name the row.
        if not pa.types.is_large_string(column.type):
            column = column.cast(pa.large_binary()).view(pa.large_string())
        _validate(column, path=path, first_row=first_row)
    return column.cast(pa.large_string())


def _resolve(fields: Iterable[pa.Field], name: str) -> list[tuple[pa.Field, ...]]:
    """Return the fields that a name with dots may mean, each as a path of fields.

    A field with the whole name comes before fields of structs.
    """
    fields = list(fields)
    exact = [(field,) for field in fields if field.name == name]
    if exact:
        return exact
    return [
        (field, *inner)
        for field in fields
        if name.startswith(f"{field.name}.") and pa.types.is_struct(field.type)
        for inner in _resolve(list(field.type), name.removeprefix(f"{field.name}."))
    ]


def _list_names(fields: Iterable[pa.Field]) -> list[str]:
    """Return the names of columns; a field of a struct is named with a dot."""
    return [
        name if inner is None else f"{name}.{inner}"
        for field in fields
        for name in [field.name]
        for inner in (_list_names(field.type) if pa.types.is_struct(field.type) else [None])
    ]


def _value_type(column_type: pa.DataType) -> pa.DataType:
    if isinstance(column_type, pa.BaseExtensionType):
        column_type = column_type.storage_type
    return column_type.value_type if pa.types.is_dictionary(column_type) else column_type


def _validate(texts: pa.Array, *, path: Path, first_row: int) -> None:
    """Validate an array; bytes that are not UTF-8 raise an error with their place.

    Raises:
        FileProblem: A text is not UTF-8.
        pa.ArrowInvalid: The array is damaged.
    """
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        where = "row"
        if pa.types.is_dictionary(texts.type):
            texts, first_row, where = texts.dictionary, 0, "dictionary entry"
        as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}.get(texts.type)
        if as_bytes is None:
            raise FileProblem(
                path, f"has bytes that are not UTF-8 ({error})", "convert it to UTF-8"
            ) from error
        values = texts.view(as_bytes)
        values.validate(full=True)
        for row, value in enumerate(values.to_pylist(), start=first_row):
            _check_utf8(value or b"", f"the text in {where} {row}", path)
        raise


def _check_utf8(value: bytes, place: str, path: Path) -> None:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileProblem(
            path,
            f"has bytes that are not UTF-8 at byte offset {error.start} of {place} "
            f"(0x{value[error.start]:02x}), counting from 0",
            "convert it to UTF-8",
        ) from error
