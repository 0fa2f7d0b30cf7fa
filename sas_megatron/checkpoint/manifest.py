"""The folder of a checkpoint and its manifest, which records the size and checksum of each file; no torch.

    checkpoints/iter_0001000/  __0_0.distcp …   tensors of each rank, in torch's distributed format
                               .metadata        positions of the shards of each tensor in these files
                               progress.json    step, samples, schedule     config.yaml   config of the run
                               manifest.json    all files above             manifest.sha256   its checksum

All files are written to `iter_0001000.partial` and synced to disk. The folder is then renamed, so a
checkpoint with its final name is complete. `latest_checkpointed_iteration.txt` beside it has its step.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter

from sas_megatron.config.errors import FileProblem, translate_os_errors
from sas_megatron.io.file_records import (
    FileRecord,
    describe_file,
    describe_read_error,
    find_damage,
    parse_json,
    read_regular_file,
)
from sas_megatron.io.files import sync, write_file

# Formats 1 and 2 held one file per rank.
SCHEMA = 3
MANIFEST, MANIFEST_CHECKSUM = "manifest.json", "manifest.sha256"
LATEST = "latest_checkpointed_iteration.txt"
METADATA, PROGRESS, CONFIG = ".metadata", "progress.json", "config.yaml"
UNREADABLE = f"is damaged: {MANIFEST} cannot be read"
DAMAGE_REMEDY = "restore it from a copy, or resume from the previous checkpoint with checkpoint.resume=true"
_NAME = re.compile(r"iter_(\d{7,})")
_TEMPORARY_NAME = re.compile(r"iter_\d{7,}\.(partial|replaced)")


class DamagedCheckpoint(FileProblem):
    """Files of a checkpoint differ from what was written. An earlier checkpoint may be intact."""


@dataclass(frozen=True)
class Manifest:
    """The contents of manifest.json."""

    step: int
    engine: str
    # Layout of the ranks that saved the checkpoint (`describe_layout`).
    layout: dict[str, Any]
    # The keys are paths relative to the folder of the checkpoint.
    files: dict[str, FileRecord]


class _Schema(BaseModel):
    """The format of any manifest."""

    schema_number: int = Field(alias="schema", strict=True)


class _Counts(BaseModel):
    """The part of a run's counts that must agree with the manifest."""

    step: int


class _Progress(BaseModel):
    """What every progress.json contains."""

    counts: _Counts
    engine: dict[str, int]
    schedule_steps: int


_MANIFEST_TYPE = TypeAdapter(Manifest)


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step` steps."""
    return f"iter_{step:07d}"


def partial_folder(folder: Path, step: int) -> Path:
    """Return the temporary folder in which the checkpoint after `step` steps is written."""
    return folder / f"{checkpoint_name(step)}.partial"


def find_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, those with more steps first."""
    if not folder.is_dir():
        return []
    complete = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(complete, key=_step_of, reverse=True)


def find_run_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, the newest first.

    Args:
        run: The run directory or its `checkpoints` folder.
    """
    return find_checkpoints(run / "checkpoints") or find_checkpoints(run)


def find_checkpoint(path: Path) -> Path | None:
    """Return `path` if it is a checkpoint, otherwise the newest checkpoint of the run at `path`, if any."""
    if _NAME.fullmatch(path.name) or (path / MANIFEST).exists():
        return path
    return next(iter(find_run_checkpoints(path)), None)


def write_synced(path: Path, text: str) -> None:
    """Write a file and sync it to disk."""
    path.write_text(text, encoding="utf-8")
    sync(path)


def publish(partial: Path, manifest: Manifest) -> Path:
    """Write the manifest into a complete temporary folder and rename the folder to its final name."""
    write_synced(partial / MANIFEST, json.dumps({"schema": SCHEMA, **asdict(manifest)}, indent=2) + "\n")
    checksum = describe_file(partial / MANIFEST).sha256
    # `sha256sum -c` reads this format.
    write_synced(partial / MANIFEST_CHECKSUM, f"{checksum}  {MANIFEST}\n")
    for folder in {partial, *(path.parent for path in partial.rglob("*"))}:
        sync(folder)
    final = partial.with_suffix("")
    if final.exists() or final.is_symlink():  # The run resumed from an earlier checkpoint.
        replaced = final.with_suffix(".replaced")
        _delete(replaced)
        final.rename(replaced)
    partial.rename(final)
    # Megatron-LM's name of the newest checkpoint, for other programs; this package lists the folder.
    write_file(final.parent / LATEST, str(manifest.step))
    sync(final.parent)
    return final


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint at `path`, without the files that it lists.

    Raises:
        DamagedCheckpoint: The manifest is missing, or its checksum does not match, or `path` is a file or a
            link to nothing.
        FileProblem: `path` does not exist, or this version does not read the checkpoint's format.
    """
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise DamagedCheckpoint(path, "is damaged: it is not a folder, nor a link to one", DAMAGE_REMEDY)
    if not path.is_dir():
        raise FileProblem(
            path, "is not a folder", "name a checkpoint, for example run/checkpoints/iter_0001000"
        )
    checksum = path / MANIFEST_CHECKSUM
    with translate_os_errors(path, problem=UNREADABLE, remedy=DAMAGE_REMEDY, error_type=DamagedCheckpoint):
        text = read_regular_file(path / MANIFEST)
        # Formats 1 and 2 have no checksum of the manifest.
        recorded = read_regular_file(checksum) if checksum.exists() else None
    if recorded not in (None, f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()):
        raise DamagedCheckpoint(
            path, f"is damaged: {MANIFEST} or {MANIFEST_CHECKSUM} was modified", DAMAGE_REMEDY
        )
    try:
        _check_schema(path, _Schema.model_validate(parse_json(text)).schema_number)
        if recorded is None:
            raise DamagedCheckpoint(path, f"is damaged: {MANIFEST_CHECKSUM} is missing", DAMAGE_REMEDY)
        manifest = _MANIFEST_TYPE.validate_json(text, strict=True)
    except ValueError as error:
        raise DamagedCheckpoint(path, f"{UNREADABLE} ({describe_read_error(error)})", DAMAGE_REMEDY) from None
    raise_if_damaged(path, _find_contradictions(path, manifest))
    return manifest


def _find_contradictions(path: Path, manifest: Manifest) -> Iterator[str]:
    """Yield what a manifest made by hand may contain, but no published one does."""
    for name in (METADATA, PROGRESS, CONFIG):
        if name not in manifest.files:
            yield f"{name} is not in {MANIFEST}"
    if manifest.step < 0 or any(record.size_bytes < 0 for record in manifest.files.values()):
        yield f"{MANIFEST} has a negative number"
    if _NAME.fullmatch(path.name) and _step_of(path) != manifest.step:
        yield f"{MANIFEST} has step {manifest.step}, and the folder is named for step {_step_of(path)}"


def read_progress(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Read the progress in the checkpoint at `path`, whose files have been verified.

    Raises:
        DamagedCheckpoint: It is not the progress of the manifest's step.
    """
    try:
        progress: dict[str, Any] = parse_json(read_regular_file(path / PROGRESS))
        found = _Progress.model_validate(progress, strict=True)
        if found.counts.step != manifest.step:
            raise ValueError(f"has step {found.counts.step}, and {MANIFEST} has step {manifest.step}")
        if manifest.engine == "megatron" and "num_updates" not in found.engine:
            raise ValueError("has no engine.num_updates")
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(
            path, f"is damaged: {PROGRESS}: {describe_read_error(error)}", DAMAGE_REMEDY
        ) from None
    return progress


def _check_schema(path: Path, schema: int) -> None:
    if schema > SCHEMA:
        raise FileProblem(path, f"has format {schema}, newer than {SCHEMA}", "update the package")
    if schema < SCHEMA:
        raise FileProblem(
            path, f"has format {schema}, older than {SCHEMA}", "resume with the version that wrote it"
        )


def raise_if_damaged(path: Path, damage: Iterable[str]) -> None:
    """Raise an error that lists the damaged files of the checkpoint at `path`, if there are any.

    Args:
        path: Folder of the checkpoint.
        damage: Lines from `find_damage`.

    Raises:
        DamagedCheckpoint: `damage` is not empty.
    """
    if found := sorted(damage):
        raise DamagedCheckpoint(path, f"is damaged: {'; '.join(found)}", DAMAGE_REMEDY)


def verify_checkpoint(path: Path) -> Manifest:
    """Read every file of the checkpoint at `path` in this process and compare it with the manifest.

    Raises:
        DamagedCheckpoint: Files differ from the manifest. The message names each of them.
        FileProblem: `path` is not a folder, or this version does not read the checkpoint's format.
    """
    manifest = read_manifest(path)
    raise_if_damaged(path, find_damage(path, manifest.files))
    read_progress(path, manifest)
    return manifest


def remove_old_checkpoints(
    folder: Path, *, newest: int, keep_last: int | None, is_permanent: Callable[[int], bool]
) -> list[Path]:
    """Remove old checkpoints, and temporary folders of interrupted saves and removals.

    Of a checkpoint that is a symbolic link only the link is removed.

    Args:
        folder: The `checkpoints` folder of the run. No process may be writing to it.
        newest: Step of the checkpoint that was just published. Checkpoints after later steps, which exist if
            the run resumed from an earlier checkpoint, are kept and not counted.
        keep_last: Number of the newest checkpoints to keep; None keeps all. Checkpoints with missing or
            truncated files are not counted, so the newest intact checkpoint is always kept.
        is_permanent: Returns True for steps whose checkpoints are always kept.

    Returns:
        The removed checkpoints.
    """
    for path in folder.iterdir():
        if _TEMPORARY_NAME.fullmatch(path.name):
            _delete(path)
    if keep_last is None:
        return []
    checkpoints = [path for path in find_checkpoints(folder) if _step_of(path) <= newest]
    kept = [path for path in checkpoints if is_complete(path)][:keep_last]
    if len(kept) < keep_last:
        return []
    removed = []
    for path in checkpoints:
        if _step_of(path) < _step_of(kept[-1]) and not is_permanent(_step_of(path)):
            _remove(path)
            removed.append(path)
    return removed


def _remove(path: Path) -> None:
    """Rename a checkpoint, then remove it, so that a crash leaves no incomplete folder with a final name."""
    renamed = path.with_suffix(".replaced")
    path.rename(renamed)
    _delete(renamed)


def _delete(path: Path) -> None:
    """Delete a folder and its contents, a file, or a symbolic link without its target, if it exists."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def is_complete(path: Path) -> bool:
    """Return whether a checkpoint has all its files, with their sizes; their contents are not read."""
    try:
        manifest = read_manifest(path)
        return all((path / name).stat().st_size == file.size_bytes for name, file in manifest.files.items())
    except (FileProblem, OSError):
        return False


def _step_of(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None, f"{path} is not the name of a checkpoint"
    return int(found[1])
