"""Walk folders of documents, and distinguish documents from other files by their content.

A folder may contain links, datasets saved by `datasets.save_to_disk`, and JSON files that describe documents:

    saved dataset   state.json lists the Arrow shards; other .arrow files are caches of `map`
    several splits  dataset_dict.json lists the folders of saved datasets
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.data.text_columns import find_value

logger = logging.getLogger(__name__)

# What is left out of a folder.
HIDDEN = "hidden files or folders"
FOLDER_ALREADY_READ = "folders linked to twice"
NOT_LISTED = "files that a saved dataset does not list"
NO_DOCUMENTS = "JSON files without documents"
STATE, SPLITS, INFO = "state.json", "dataset_dict.json", "dataset_info.json"
# A JSON file that is not JSON lines is read completely up to this size.
MAX_DESCRIPTION_BYTES = 1 << 24


def walk_folder(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Yield the files of a folder and its folders, sorted by path; of a saved dataset, those that it lists.

    Links are followed, but a folder is read only once.

    Args:
        folder: The folder.
        left_out: Gets the counts of what is left out.

    Raises:
        FileProblem: A folder cannot be read, or a saved dataset is incomplete.
    """
    return _walk(folder, left_out, visited={os.path.realpath(folder)})


def _walk(folder: Path, left_out: Counter[str], *, visited: set[str]) -> Iterator[Path]:
    with translate_os_errors(folder, problem="cannot be read", remedy="check its permissions"):
        # Names in one order for files and folders are an order by path, the same on every file system.
        names = sorted(os.listdir(folder))
    listed = _list_saved_dataset(folder, names)
    if listed is not None:
        left_out[NOT_LISTED] += len(set(names) - set(listed) - {STATE, SPLITS, INFO})
        names = listed
    for name in names:
        path = folder / name
        if name.startswith(".") and listed is None:
            left_out[HIDDEN] += 1
        elif not os.path.isdir(path):
            yield path
        elif (real_path := os.path.realpath(path)) in visited:
            left_out[FOLDER_ALREADY_READ] += 1
        else:
            visited.add(real_path)
            yield from _walk(path, left_out, visited=visited)
    left_out += Counter()  # removes counts of zero


def _list_saved_dataset(folder: Path, names: list[str]) -> list[str] | None:
    """Return the names of the shards or splits of a saved dataset; None for another folder.

    Raises:
        FileProblem: A listed file or folder is missing, or the dataset was saved without its selected rows.
    """
    remedy = "save the dataset again with datasets.save_to_disk"
    if SPLITS in names and isinstance(listed := _read_field(folder / SPLITS, "splits"), list):
        source = folder / SPLITS
        if len(listed) > 1:
            splits = ", ".join(map(str, listed))
            logger.warning(
                "%s: reads all splits of the saved dataset: %s; name %s to read one",
                *(folder, splits, folder / str(listed[0])),
            )
    elif STATE in names and isinstance(files := _read_field(folder / STATE, "_data_files"), list):
        source = folder / STATE
        listed = [file.get("filename") if isinstance(file, dict) else file for file in files]
        if _read_field(source, "_indices_data_files"):
            raise FileProblem(
                source, "has a selection of rows", f"call flatten_indices() first, and {remedy}"
            )
    else:
        return None
    for name in listed:
        if name not in names:
            raise FileProblem(source, f"lists {name!r}, which is not in the folder", remedy)
    return listed


def _has_json_lines(path: Path) -> bool:
    """Return whether the first of several lines is a complete JSON value; then the rest need not be read."""
    try:
        with open(path, "rb") as lines:
            first, second = lines.readline(MAX_DESCRIPTION_BYTES), lines.readline(MAX_DESCRIPTION_BYTES)
        json.loads(first)
        return bool(second.strip())
    except (OSError, ValueError, RecursionError):
        return False


def _read_field(path: Path, name: str) -> Any:
    """Return a field of a JSON object; None if the file is none."""
    value = _read_json(path)
    return value.get(name) if isinstance(value, dict) else None


def _read_json(path: Path) -> Any:
    """Return the value of a JSON file; None if it is none, is too large or cannot be read."""
    try:
        if path.stat().st_size > MAX_DESCRIPTION_BYTES:
            return None
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def has_no_documents(path: Path, text_column: str) -> bool:
    """Return whether a `.json` file is a single JSON value without text, such as a description or a manifest.

    A file in JSON lines has documents, and so has a damaged file, whose reader reports the damage.
    """
    value = None if _has_json_lines(path) else _read_json(path)
    if value is None:
        return False
    if isinstance(value, dict):
        try:
            find_value(value, text_column)
        except KeyError:
            return True
        return False
    return not (isinstance(value, list) and any(isinstance(entry, dict) for entry in value))
