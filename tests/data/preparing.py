"""Functions that prepare token files and read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sas_megatron.data.prepare import Preparation, PreparationProgress, prepare_token_files
from tests.small_data import SmallData


def prepare(
    source: Path,
    tokenizer_path: Path,
    prefix: Path,
    *,
    num_workers: int = 1,
    overwrite: bool = False,
    report_progress: Callable[[PreparationProgress], None] | None = None,
) -> Preparation:
    return prepare_token_files(
        [source],
        tokenizer_path=tokenizer_path,
        prefix=prefix,
        num_workers=num_workers,
        overwrite=overwrite,
        report_progress=report_progress,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".idx")
    }


def prepare_two_documents(small_data: SmallData, folder: Path) -> Path:
    """Prepare token files from a folder of two texts, and return their prefix."""
    (folder / "texts").mkdir()
    for name in ("first", "second"):
        (folder / "texts" / f"{name}.txt").write_text(f"{name} of the texts, " * 50)
    prefix = folder / "few"
    prepare_token_files([folder / "texts"], tokenizer_path=small_data.tokenizer, prefix=prefix, num_workers=1)
    return prefix
