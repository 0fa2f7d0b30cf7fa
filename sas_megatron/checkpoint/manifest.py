"""What makes a folder a checkpoint: its final name, and a manifest with size and checksum of each file.

    checkpoints/iter_0001000/  __0_0.distcp …   tensors of each rank, in torch's distributed format
                               .metadata        where each tensor's parts lie in them
                               progress.json    step, samples, schedule     config.yaml   the run's config
                               manifest.json    all of the above            manifest.sha256   its checksum

Everything is written, and synced to disk, in `iter_0001000.partial`, which is then renamed: what has
its final name is complete. Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import FileProblem, describe_os_error, translate_os_errors
from sas_megatron.io.files import sync

# 1 and 2 were one file a rank.
SCHEMA = 3
MANIFEST, MANIFEST_CHECKSUM = "manifest.json", "manifest.sha256"
# What was counted, and the config of the run.
PROGRESS, CONFIG = "progress.json", "config.yaml"
GO_BACK = "put it back from a copy, or go on from the one before with checkpoint.resume=true"
UNREADABLE = f"is damaged: it has no readable {MANIFEST}"
_NAME = re.compile(r"iter_(\d{7,})")
_LEFT_OVER = re.compile(r"iter_\d{7,}\.(partial|replaced)")


class DamagedCheckpoint(FileProblem):
    """Files of a checkpoint are not what was written; an earlier checkpoint may serve."""


@dataclass(frozen=True)
class FileRecord:
    """A file as it was when the checkpoint was published."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`layout` is of the ranks that saved; `files` are relative to the checkpoint's folder."""

    step: int
    engine: str
    layout: dict[str, Any]
    files: dict[str, FileRecord]


def describe_file(path: Path) -> FileRecord:
    """Reads the file once."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def checkpoint_name(step: int) -> str:
    """The folder's name of the checkpoint after `step` steps."""
    return f"iter_{step:07d}"


def partial_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it gets its name."""
    return folder / f"{checkpoint_name(step)}.partial"


def find_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints within `folder`, the one with the most steps first."""
    if not folder.is_dir():
        return []
    complete = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(complete, key=_step_of, reverse=True)


def checkpoints_of(run: Path) -> list[Path]:
    """The complete checkpoints of a run, by its directory or its `checkpoints`, the newest first."""
    return find_checkpoints(run / "checkpoints") or find_checkpoints(run)


def find_checkpoint(path: Path) -> Path | None:
    """`path`, if it is a checkpoint, else the newest of the run that is there; None if there is none."""
    if _NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        return path
    return next(iter(checkpoints_of(path)), None)


def write_synced(path: Path, text: str) -> None:
    """Writes a file and waits until it is on disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def publish(partial: Path, manifest: Manifest) -> Path:
    """Writes the manifest into a finished folder and gives it its final name, in one step."""
    write_synced(partial / MANIFEST, json.dumps({"schema": SCHEMA, **asdict(manifest)}, indent=2) + "\n")
    checksum = describe_file(partial / MANIFEST).sha256
    # In the form that `sha256sum -c` takes.
    write_synced(partial / MANIFEST_CHECKSUM, f"{checksum}  {MANIFEST}\n")
    for folder in {partial, *(path.parent for path in partial.rglob("*"))}:
        sync(folder)
    final = partial.with_suffix("")
    if final.exists():  # saved again, after going on from an earlier one
        replaced = final.with_suffix(".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    return final


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint at `path`; the files that it lists are not looked at.

    Raises:
        DamagedCheckpoint: it is missing or not what was written.
        FileProblem: its format is of another version.
    """
    if not path.is_dir():
        raise FileProblem(path, "is no folder", "give a checkpoint, such as run/checkpoints/iter_0001000")
    checksum = path / MANIFEST_CHECKSUM
    with translate_os_errors(path, problem=UNREADABLE, remedy=GO_BACK, error_type=DamagedCheckpoint):
        text = (path / MANIFEST).read_bytes()
        # The manifests of formats 1 and 2 have none.
        told = checksum.read_bytes() if checksum.exists() else None
    if told not in (None, f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()):
        raise DamagedCheckpoint(path, f"is damaged: {MANIFEST} or {MANIFEST_CHECKSUM} has changed", GO_BACK)
    try:
        tree = json.loads(text)
        _check_schema(path, int(tree["schema"]))
        if told is None:
            raise DamagedCheckpoint(path, f"is damaged: {MANIFEST_CHECKSUM} is missing", GO_BACK)
        files = {name: FileRecord(**record) for name, record in tree["files"].items()}
        return Manifest(tree["step"], tree["engine"], tree["layout"], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(path, f"{UNREADABLE} ({error!r})", GO_BACK) from None


def _check_schema(path: Path, schema: int) -> None:
    if schema > SCHEMA:
        raise FileProblem(path, f"has format {schema}, newer than {SCHEMA}", "update the package")
    if schema < SCHEMA:
        raise FileProblem(
            path, f"has format {schema}, older than {SCHEMA}", "go on with the version that wrote it"
        )


def find_damage(path: Path, files: dict[str, FileRecord]) -> list[str]:
    """What is wrong with those files of the checkpoint at `path`, a line each; reads each of them once."""
    return [
        f"{name} {damage}"
        for name, record in files.items()
        if (damage := _damage(path / name, record)) is not None
    ]


def _damage(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
        if size != record.size_bytes:
            return f"has {size:,} bytes, {record.size_bytes:,} were written"
        if describe_file(path).sha256 != record.sha256:
            return "has other contents than were written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({describe_os_error(error)})"
    return None


def refuse_damage(path: Path, damage: Iterable[str]) -> None:
    """Raises `DamagedCheckpoint` if there is any."""
    if found := sorted(damage):
        raise DamagedCheckpoint(path, f"is damaged: {'; '.join(found)}", GO_BACK)


def verify_checkpoint(path: Path) -> Manifest:
    """Reads every file of the checkpoint at `path` in this process.

    Raises:
        DamagedCheckpoint: some are not what was written; it names each.
        FileProblem: its format is of another version.
    """
    manifest = read_manifest(path)
    refuse_damage(path, find_damage(path, manifest.files))
    return manifest


def remove_old(
    folder: Path, *, newest: int, keep_last: int | None, is_permanent: Callable[[int], bool]
) -> list[Path]:
    """Removes what is not to be kept, and what interrupted saves and removals have left.

    Args:
        folder: The run's `checkpoints` folder; nothing is being written there.
        newest: The step whose checkpoint was just published. Those of more steps, which the run has gone
            back from, are let alone and do not count.
        keep_last: How many of the newest stay; None: all. Those with missing or cut files do not count,
            so that of the sound ones the last always stays.
        is_permanent: Those of whose step it is true stay too.

    Returns:
        The checkpoints removed.
    """
    for path in folder.iterdir():
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path)
    if keep_last is None:
        return []
    checkpoints = [path for path in find_checkpoints(folder) if _step_of(path) <= newest]
    kept = [path for path in checkpoints if _looks_whole(path)][:keep_last]
    if len(kept) < keep_last:
        return []
    removed = []
    for path in checkpoints:
        if _step_of(path) < _step_of(kept[-1]) and not is_permanent(_step_of(path)):
            _remove(path)
            removed.append(path)
    return removed


def _remove(path: Path) -> None:
    """First the name, so that what a crash leaves half removed is not taken for a checkpoint."""
    doomed = path.with_suffix(".replaced")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _looks_whole(path: Path) -> bool:
    try:
        manifest = read_manifest(path)
        return all((path / name).stat().st_size == file.size_bytes for name, file in manifest.files.items())
    except (FileProblem, OSError):
        return False


def _step_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None, f"{path} is not named as a checkpoint is"
    return int(found[1])


def find_own_share(files: dict[str, FileRecord], *, rank: int, num_ranks: int) -> dict[str, FileRecord]:
    """Files that one of several ranks is to read, so that all together read each once, in like shares."""
    by_size: Sequence[str] = sorted(files, key=lambda name: (-files[name].size_bytes, name))
    return {name: files[name] for name in by_size[rank::num_ranks]}
