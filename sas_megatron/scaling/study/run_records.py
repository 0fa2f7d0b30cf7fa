"""Compact records: what a study keeps of a finished run, in one file of at most 20 kB.

config.yaml, run.json, summary.json  unchanged ─┐
metrics.jsonl  fewer of its lines ──────────────┴─→ a JSON object with its SHA-256 → gzip

A record contains the files of a run directory, so that every command reads an imported run as it reads a run
that was trained on this machine. The same run gives the same bytes. The checksum is that of the contents, so
that it does not depend on the version of the compression.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from sas_megatron.config.errors import FileProblem, UserError, translate_os_errors
from sas_megatron.io.file_records import describe_read_error, parse_json, read_regular_file

SCHEMA_VERSION = 1
ENDING = ".json.gz"
MAX_RECORD_BYTES = 20_000
# Contents of a record; more is refused before it is decompressed completely.
MAX_CONTENT_BYTES = 1 << 24
METRICS = "metrics.jsonl"
# The files of a run; a run of a sweep that diverged has no summary.json.
RUN_FILES = ("config.yaml", "run.json", "summary.json", METRICS)
# Lines of metrics.jsonl that are kept, by kind; the first choice that fits into `MAX_RECORD_BYTES` is used.
# Evaluations are the results of a run, and are kept as far as possible.
_CHOICES: tuple[dict[str, int], ...] = tuple(
    # Measurements of an update and of the probe belong together: equal numbers keep those of equal steps.
    {"train": train, "update": probes, "probe": probes, "health": 20, "validation": evaluations}
    for evaluations in (1000, 100, 25)
    for train, probes in ((64, 8), (32, 4), (16, 2), (8, 1))
)


class CompactRecord(BaseModel):
    """The files of a run, or the records of a study, by name.

    `left_out` counts the lines of metrics.jsonl that the run has and the record lacks, by kind.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    schema_version: Literal[1] = 1
    study: str
    name: str
    files: dict[str, str]
    left_out: dict[str, int] = {}

    @property
    def sha256(self) -> str:
        """The SHA-256 of the contents as JSON with sorted keys and without spaces."""
        content = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def compress(self) -> bytes:
        """Return the bytes of the record's file."""
        content = json.dumps({**self.model_dump(), "sha256": self.sha256}, sort_keys=True, ensure_ascii=False)
        # Without the time, equal contents give equal bytes.
        return gzip.compress(content.encode(), compresslevel=9, mtime=0)


def build_run_record(directory: Path, *, study: str) -> CompactRecord:
    """Return the record of the run in a directory.

    Raises:
        UserError: A file cannot be read, or the run does not fit into `MAX_RECORD_BYTES`.
    """
    files = {}
    for name in RUN_FILES:
        path = directory / name
        if path.exists():
            with translate_os_errors(path, problem="cannot be read", remedy="check its permissions"):
                files[name] = path.read_text(encoding="utf-8")
    lines = files[METRICS].splitlines()
    for kept in _CHOICES:
        chosen, left_out = thin_metrics(lines, kept)
        metrics = {METRICS: "".join(line + "\n" for line in chosen)}
        record = CompactRecord(study=study, name=directory.name, files=files | metrics, left_out=left_out)
        size = len(record.compress())
        if size <= MAX_RECORD_BYTES:
            return record
    raise UserError(
        f"{directory}: its record would have {size:,} bytes, more than {MAX_RECORD_BYTES:,}; "
        "evaluate with fewer probe_sequences or resume the run less often"
    )


def thin_metrics(lines: Sequence[str], kept: Mapping[str, int]) -> tuple[list[str], dict[str, int]]:
    """Return lines of metrics.jsonl that are evenly spaced, with the first and the last of each kind.

    Args:
        lines: The lines; those that are no objects are left out.
        kept: Number of lines of each kind that are kept; of other kinds, all are.

    Returns:
        The lines in their order, and the number of the others by kind.
    """
    by_kind: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        by_kind.setdefault(_find_kind(line), []).append(index)
    chosen: set[int] = set()
    left_out = Counter({kind: len(indices) for kind, indices in by_kind.items()})
    for kind, indices in by_kind.items():
        found = {indices[position] for position in _space_evenly(len(indices), kept.get(kind, len(indices)))}
        if kind != _UNREADABLE:
            chosen |= found
            left_out[kind] -= len(found)
    return [lines[index] for index in sorted(chosen)], dict(sorted((+left_out).items()))


_UNREADABLE = "unreadable"


def _find_kind(line: str) -> str:
    try:
        return str(parse_json(line)["kind"])
    except (ValueError, KeyError, TypeError):
        return _UNREADABLE


def _space_evenly(count: int, kept: int) -> Iterator[int]:
    """Yield `kept` of the positions 0 to count − 1; if it is 1, the last one."""
    if count <= kept:
        yield from range(count)
    elif kept == 1:
        yield count - 1
    else:
        yield from (round(step * (count - 1) / (kept - 1)) for step in range(kept))


def read_record(path: Path) -> CompactRecord:
    """Read a record and compare it with its checksum.

    Raises:
        FileProblem: The file cannot be read or is damaged, or has another schema.
    """
    remedy = "restore it from a copy, or export the run again"
    try:
        compressed = read_regular_file(path, max_bytes=MAX_CONTENT_BYTES)
        decompressor = zlib.decompressobj(wbits=31)
        content = decompressor.decompress(compressed, MAX_CONTENT_BYTES)
        if not decompressor.eof:
            raise ValueError("it is incomplete or too large")
        tree: dict[str, Any] = parse_json(content)
        if not isinstance(tree, dict):
            raise ValueError("it is not an object")
        expected = tree.pop("sha256", None)
        if tree.get("schema_version") != SCHEMA_VERSION:
            found = tree.get("schema_version")
            raise FileProblem(path, f"has schema version {found}, not {SCHEMA_VERSION}, of a record", remedy)
        record = CompactRecord.model_validate(tree)
    except FileNotFoundError:
        raise FileProblem(path, "does not exist", "name the folder of records") from None
    except (OSError, ValueError, zlib.error) as error:
        reason = describe_read_error(error) if isinstance(error, OSError | ValueError) else str(error)
        raise FileProblem(path, f"is damaged ({reason})", remedy) from None
    if expected != record.sha256:
        raise FileProblem(path, "is damaged (its contents differ from their SHA-256)", remedy)
    return record
