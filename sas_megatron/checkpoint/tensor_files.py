"""Read and write unsharded tensors in safetensors files, which are named as in transformers.

STEM.safetensors, or for large models STEM-00001-of-00003.safetensors …, STEM.safetensors.index.json
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from sas_megatron.config.errors import FileProblem, UserError, translate_os_errors
from sas_megatron.io.file_records import describe_read_error, open_regular_file, parse_json, read_regular_file
from sas_megatron.io.files import make_folder, sync

NamedTensors = Iterable[tuple[str, torch.Tensor]]

# Tensors with one row per token. Rows beyond the vocabulary are padding.
EMBEDDING_NAMES = ("embedding.word_embeddings.weight", "output_layer.weight")
# Largest size of a file, which is held in memory in addition to the source while it is written.
SHARD_BYTES = 2_000_000_000


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors in a folder of safetensors files by name. Each tensor is read when it is accessed.

    Raises:
        FileProblem: A file is missing or damaged, or the accessed tensor does not exist.
    """

    def __init__(self, folder: Path, *, stem: str) -> None:
        self.folder = folder
        self._opened = [_open_file(path) for path in _find_files(folder, stem)]
        self._file_of = {name: file for file in self._opened for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file(name).get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading the tensor.

        Raises:
            FileProblem: The tensor does not exist.
        """
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the type of a tensor as safetensors names it, such as "F32", without reading the tensor.

        Raises:
            FileProblem: The tensor does not exist.
        """
        return str(self._file(name).get_slice(name).get_dtype())

    def _file(self, name: str) -> Any:
        if name not in self._file_of:
            raise FileProblem(self.folder, f"has no tensor {name}", "name a folder with all weights")
        return self._file_of[name]


@dataclass
class WeightsDigest:
    """A SHA-256 of named tensors that depends neither on their order nor on their division into files.

    Ranks that each read some of the tensors can concatenate their `lines`, one per tensor.
    """

    lines: list[str] = field(default_factory=list)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a CPU tensor."""
        content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        tensor_sha256 = hashlib.sha256(content.data).hexdigest()
        self.lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor_sha256}")

    def value(self) -> str:
        """Return the digest of all added tensors."""
        return hashlib.sha256("\n".join(sorted(self.lines)).encode()).hexdigest()


def write_tensors(folder: Path, tensors: NamedTensors, *, stem: str, shard_bytes: int = SHARD_BYTES) -> str:
    """Write tensors in the given order to one or more safetensors files.

    Args:
        folder: Existing folder.
        tensors: Names and tensors.
        stem: First part of the file names.
        shard_bytes: Largest total size of the tensors in a file. A larger tensor gets its own file.

    Returns:
        The value of their `WeightsDigest`.

    Raises:
        FileProblem: A file cannot be written.
    """
    save_file = _import_safetensors("safetensors.torch").save_file
    safetensors_error = _import_safetensors("safetensors").SafetensorError
    digest = WeightsDigest()
    shards: list[dict[str, int]] = []  # bytes by tensor name
    pending: dict[str, torch.Tensor] = {}

    def write_pending() -> None:
        path = folder / f"{stem}-{len(shards)}.partial"
        try:
            save_file(pending, path, metadata={"format": "pt"})
        except safetensors_error as error:  # also raised for errors of the file system
            raise FileProblem(
                path, f"cannot be written ({error})", "free space, or name another folder"
            ) from None
        shards.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending.clear()

    for name, tensor in tensors:
        on_cpu = tensor.detach().cpu().contiguous()
        if pending and sum(other.nbytes for other in pending.values()) + on_cpu.nbytes > shard_bytes:
            write_pending()
        digest.add(name, on_cpu)
        pending[name] = on_cpu
    write_pending()
    _rename_shards(folder, stem, shards)
    return digest.value()


def _rename_shards(folder: Path, stem: str, shards: list[dict[str, int]]) -> None:
    """Give the files their final names, which contain the number of files, and write the index."""
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [
            f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)
        ]
        index = {
            "metadata": {"total_size": sum(sum(sizes.values()) for sizes in shards)},
            "weight_map": {name: file for file, sizes in zip(names, shards, strict=True) for name in sizes},
        }
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
    for number, name in enumerate(names):
        path = folder / f"{stem}-{number}.partial"
        sync(path)
        path.rename(folder / name)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder, and rename it to `folder` at the end of the block, or remove it on an error.

    Raises:
        FileProblem: `folder` exists already, or cannot be created.
    """
    if folder.exists():
        raise FileProblem(folder, "exists already", "name a new folder, or remove this one")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with translate_os_errors(folder, problem="cannot be written", remedy="name another folder"):
            make_folder(folder.parent)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            yield partial
            partial.rename(folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return [folder / f"{stem}.safetensors"]
    try:
        names = set(_Index.model_validate(parse_json(read_regular_file(index))).weight_map.values())
    except (OSError, ValueError) as error:
        reason = describe_read_error(error)
        raise FileProblem(
            index, f"is not an index of safetensors files ({reason})", "copy it again"
        ) from None
    # Weights come only from the folder that the user named.
    for name in names:
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise FileProblem(index, f"names a file outside of the folder ({name!r})", "copy the model again")
    return [folder / name for name in sorted(names)]


class _Index(BaseModel):
    """The part of an index of safetensors files that is read here."""

    weight_map: dict[str, str]


def _open_file(path: Path) -> Any:
    safetensors = _import_safetensors("safetensors")
    try:
        open_regular_file(path).close()
        return safetensors.safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FileProblem(
            path, "does not exist", "name a folder whose weights are in safetensors files"
        ) from None
    except (safetensors.SafetensorError, OSError) as error:
        raise FileProblem(path, f"is damaged, or not a safetensors file ({error})", "copy it again") from None


def _import_safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError("safetensors: is not installed; pip install 'sas-megatron[export]'") from None
