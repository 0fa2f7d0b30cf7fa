"""A corpus of the Python source in a pinned list of wheels, the same text on every machine.

list (name==version --hash=sha256:…) -> `pip download` -> *.py of each wheel -> filters -> exact duplicates
  -> near-duplicates -> Parquet, in an order by a hash of the path

The built-in corpus depends on the Python that is installed; this one depends on the list only.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sas_megatron.config.errors import FieldError, FileProblem, UserError, translate_os_errors
from sas_megatron.data.corpus import ROW_GROUP_DOCUMENTS, hash_documents, hash_order
from sas_megatron.data.near_duplicates import NearDuplicates
from sas_megatron.io.file_records import describe_file, open_regular_file
from sas_megatron.io.files import make_folder, replace_file, write_file

# Text that is mostly data, such as tables of a parser, which a language model of source code need not learn.
MAX_FILE_BYTES = 500_000
MAX_LINE_CHARACTERS = 1_000
# Wheels of projects with compiled parts are those for Linux on x86-64; their compiled parts are not read.
_PLATFORMS = [f"manylinux{name}_x86_64" for name in ("2014", "_2_17", "_2_24", "_2_27", "_2_28")]
PIP_OPTIONS = (
    *("--no-deps", "--only-binary=:all:", "--require-hashes", "--quiet"),
    *("--implementation", "cp", "--python-version", "3.11"),
    *(option for platform in _PLATFORMS for option in ("--platform", platform)),
)
_LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>[\w.!+-]+) +--hash=sha256:(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True)
class PinnedWheel:
    """A line of the list: a project, its version, and the SHA-256 of one wheel."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True)
class WheelCorpus:
    """The file of a corpus, and counts: documents, bytes, and what was left out by kind."""

    path: Path
    num_documents: int
    text_bytes: int
    sha256: str
    left_out: dict[str, int]


def read_wheel_list(path: Path) -> list[PinnedWheel]:
    """Read a list of wheels, in the format of pip's requirements with hashes; `#` begins a comment.

    Raises:
        FileProblem: The list cannot be read, is empty, or a line has another form or repeats a project.
    """
    with translate_os_errors(path, problem="cannot be read", remedy="name a list of wheels"):
        text = path.read_text(encoding="utf-8")
    wheels: dict[str, PinnedWheel] = {}
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None:
            raise FileProblem(
                f"{path}:{number}", "is not NAME==VERSION --hash=sha256:HEX", "pin one wheel in each line"
            )
        wheel = PinnedWheel(**match.groupdict())
        if wheel.name in wheels:
            raise FileProblem(
                f"{path}:{number}",
                f"repeats {wheel.name}, whose versions have much text in common",
                "pin one version of each project",
            )
        wheels[wheel.name] = wheel
    if not wheels:
        raise FileProblem(path, "names no wheels", "write lines NAME==VERSION --hash=sha256:HEX")
    return list(wheels.values())


def download_wheels(list_path: Path, wheels: list[PinnedWheel], folder: Path) -> dict[str, Path]:
    """Return the wheel files by SHA-256; those that are not in the folder are downloaded from pip's index.

    Raises:
        UserError: pip reports an error, or the folder cannot be written.
    """
    with translate_os_errors(folder, problem="cannot be written", remedy="choose another --wheels"):
        make_folder(folder)
    found = _find_wheels(folder)
    if not all(wheel.sha256 in found for wheel in wheels):
        command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS]
        command += ["--dest", str(folder), "--requirement", str(list_path)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = " ".join(reasons[-1:]) or "no message"
            raise UserError(f"pip download failed ({reason}); check the network and the list {list_path}")
        found = _find_wheels(folder)
    for wheel in wheels:
        if wheel.sha256 not in found:
            raise FileProblem(
                folder, f"has no wheel of {wheel.name} {wheel.version} with that hash", "correct the list"
            )
    return found


def build_wheel_corpus(
    list_path: Path,
    output: Path,
    *,
    wheel_folder: Path,
    expected_sha256: str | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> WheelCorpus:
    """Write the corpus of a list of wheels as Parquet (columns text and path), and a JSON record beside it.

    Args:
        list_path: The list of wheels.
        output: The Parquet file.
        wheel_folder: Folder of the wheels; those that are missing are downloaded.
        expected_sha256: SHA-256 of the documents that the corpus must have; None for any.
        log: Called with a line for each wheel.

    Raises:
        UserError: A wheel cannot be obtained or read, the corpus has another hash, or cannot be written.
    """
    wheels = read_wheel_list(list_path)
    files = download_wheels(list_path, wheels, wheel_folder)
    left_out: Counter[str] = Counter()
    documents: dict[str, str] = {}
    for wheel in wheels:
        before = len(documents)
        for path, text in _read_source_files(files[wheel.sha256], left_out):
            documents[f"{wheel.name}/{path}"] = text
        log(f"{wheel.name} {wheel.version}: {len(documents) - before:,} files")
    texts, paths = _remove_duplicates(documents, left_out)
    digest = hash_documents(paths, texts)
    if expected_sha256 not in (None, digest):
        raise FieldError(
            "--sha256",
            expected_sha256,
            f"is not the hash of the documents, {digest}",
            "use the original list",
        )
    corpus = WheelCorpus(
        output, len(texts), sum(len(text.encode()) for text in texts), digest, dict(left_out)
    )
    record: dict[str, Any] = {
        "num_documents": corpus.num_documents,
        "text_bytes": corpus.text_bytes,
        "sha256": digest,
        "left_out": corpus.left_out,
        "documents_by_project": dict(Counter(path.partition("/")[0] for path in paths)),
    }
    with translate_os_errors(output, problem="cannot be written", remedy="choose another --output"):
        make_folder(output.parent)
        with replace_file(output) as temporary:
            table = pa.table({"text": texts, "path": paths})
            pq.write_table(table, temporary, row_group_size=ROW_GROUP_DOCUMENTS)
        write_file(output.with_suffix(".json"), json.dumps(record, indent=2) + "\n")
    return corpus


def _find_wheels(folder: Path) -> dict[str, Path]:
    return {describe_file(path).sha256: path for path in sorted(folder.glob("*.whl"))}


def _read_source_files(wheel: Path, left_out: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield path and text of each Python source file of a wheel, sorted by path.

    Raises:
        FileProblem: The wheel cannot be read.
    """
    try:
        with open_regular_file(wheel) as file, zipfile.ZipFile(file) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(".py")):
                kind, text = _decode(archive.read(name))
                if kind is None:
                    yield name, text
                else:
                    left_out[kind] += 1
    except (OSError, zipfile.BadZipFile) as error:
        raise FileProblem(wheel, f"cannot be read ({error})", "remove it, and download it again") from None


def _decode(content: bytes) -> tuple[str | None, str]:
    """Return the text of a source file, and why it is left out; None if it is kept."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "files that are not UTF-8", ""
    if not text.strip():
        return "empty files", ""
    if len(content) > MAX_FILE_BYTES:
        return f"files over {MAX_FILE_BYTES:,} bytes", ""
    if max(map(len, text.splitlines())) > MAX_LINE_CHARACTERS:
        return f"files with a line over {MAX_LINE_CHARACTERS:,} characters", ""
    return None, text


def _remove_duplicates(documents: dict[str, str], left_out: Counter[str]) -> tuple[list[str], list[str]]:
    """Return texts and paths without duplicates, in the order of a hash of the path."""
    texts, paths = [], []
    exact: set[bytes] = set()
    near = NearDuplicates()
    for path in sorted(documents, key=hash_order):
        text = documents[path]
        # Copies in several wheels often differ in line ends only.
        digest = hashlib.sha256("\n".join(line.rstrip() for line in text.splitlines()).encode()).digest()
        if digest in exact:
            left_out["exact duplicates"] += 1
        elif not near.add(text):
            left_out["near-duplicates"] += 1
        else:
            exact.add(digest)
            texts.append(text)
            paths.append(path)
    return texts, paths
