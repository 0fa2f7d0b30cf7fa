"""An input of a fuzz target: a folder of valid files with some of them changed, and arguments."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Files by path relative to the folder of an input.
Files = dict[str, bytes]
SHOWN_BYTES = 3_000


@dataclass(frozen=True)
class Link:
    """A symbolic link in place of a file."""

    target: str


@dataclass(frozen=True)
class Folder:
    """An empty folder in place of a file."""


# None: the file is missing.
Entry = bytes | Link | Folder | None


@dataclass(frozen=True)
class Input:
    """Changes of the files of a seed, and arguments."""

    seed: str
    changes: dict[str, Entry] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """Print a short text, which hypothesis adds to a failure; `describe` has the contents."""
        printer.text(f"Input({self.seed!r}, {list(self.changes)}, {self.arguments})")

    def key(self) -> tuple[object, ...]:
        """Return a value that is equal for equal inputs and can be a key."""
        return self.seed, tuple(sorted(self.changes.items(), key=lambda item: item[0])), self.arguments

    def describe(self) -> str:
        """Return the changed files and the arguments, as text that reproduces the input if it is short."""
        lines = [f"seed: {self.seed}", f"arguments: {list(self.arguments)}"]
        for path, entry in self.changes.items():
            text = repr(entry)
            cut = f" … ({len(text):,} characters)" if len(text) > SHOWN_BYTES else ""
            lines.append(f"{path} = {text[:SHOWN_BYTES]}{cut}")
        return "\n".join(lines)


def write_files(folder: Path, files: Files) -> None:
    """Write files below `folder`."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def read_files(folder: Path) -> Files:
    """Return all files below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def apply_changes(folder: Path, changes: dict[str, Entry]) -> None:
    """Replace files below `folder`."""
    for name, entry in changes.items():
        path = folder / name
        remove(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry, bytes):
            path.write_bytes(entry)
        elif isinstance(entry, Link):
            os.symlink(entry.target, path)
        elif isinstance(entry, Folder):
            path.mkdir()


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
