"""Whole tensors in safetensors files, as transformers lays them out; never a whole model at once.

STEM.safetensors, or beyond a size STEM-00001-of-00003.safetensors …, STEM.safetensors.index.json
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

from sas_megatron.config.errors import FileProblem, UserError, translate_os_errors
from sas_megatron.io.files import make_folder, sync

NamedTensors = Iterable[tuple[str, torch.Tensor]]

# Of whole weights, those whose rows beyond the vocabulary only pad them.
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")
# What is held in memory beside the source while it is written.
SHARD_BYTES = 2_000_000_000


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a folder by name; each is read when it is asked for.

    Raises:
        FileProblem: the folder holds no such files, or one of them is damaged or absent.
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
        """The shape of a tensor, which is not read."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def _file(self, name: str) -> Any:
        if name not in self._file_of:
            raise FileProblem(self.folder, f"has no tensor {name}", "make it again, whole")
        return self._file_of[name]


@dataclass
class WeightsDigest:
    """A sha256 of named tensors that depends neither on their order nor on how files hold them.

    `lines` are of those that were counted in: ranks that each read a share can put theirs together.
    """

    lines: list[str] = field(default_factory=list)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Counts a tensor in, on the CPU."""
        content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
        own = hashlib.sha256(content.data).hexdigest()
        self.lines.append(f"{name} {tensor.dtype} {list(tensor.shape)} {own}")

    def value(self) -> str:
        """Of all tensors that were counted in."""
        return hashlib.sha256("\n".join(sorted(self.lines)).encode()).hexdigest()


def write_tensors(folder: Path, tensors: NamedTensors, *, stem: str, shard_bytes: int = SHARD_BYTES) -> str:
    """Writes tensors as they come, in files of at most `shard_bytes` each (a larger tensor has its own).

    Returns:
        Their `WeightsDigest`.

    Raises:
        FileProblem: they cannot be written.
    """
    save_file = _import_safetensors("safetensors.torch").save_file
    refusal = _import_safetensors("safetensors").SafetensorError
    digest = WeightsDigest()
    shards: list[dict[str, int]] = []  # sizes by name
    held: dict[str, torch.Tensor] = {}

    def write_held() -> None:
        path = folder / f"{stem}-{len(shards)}.partial"
        try:
            save_file(held, path, metadata={"format": "pt"})
        except refusal as error:  # also of the file system's refusals
            raise FileProblem(
                path, f"cannot be written ({error})", "make room, or name another folder"
            ) from None
        shards.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for name, tensor in tensors:
        own = tensor.detach().cpu().contiguous()
        if held and sum(other.nbytes for other in held.values()) + own.nbytes > shard_bytes:
            write_held()
        digest.add(name, own)
        held[name] = own
    write_held()
    _name_shards(folder, stem, shards)
    return digest.value()


def _name_shards(folder: Path, stem: str, shards: list[dict[str, int]]) -> None:
    """Their number is known only when all are written."""
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
    """A folder beside `folder` to write into; renamed to it when the block ends well, removed otherwise.

    Raises:
        FileProblem: `folder` is there already, or cannot be made.
    """
    if folder.exists():
        raise FileProblem(folder, "is there already", "name a new folder, or remove that one")
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
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise FileProblem(index, f"is no index of safetensors files ({error!r})", "copy it again") from None
    return [folder / name for name in dict.fromkeys(names)]


def _open_file(path: Path) -> Any:
    safetensors = _import_safetensors("safetensors")
    try:
        return safetensors.safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FileProblem(
            path, "there is no such file", "give a folder whose weights are in safetensors files"
        ) from None
    except (safetensors.SafetensorError, OSError) as error:
        raise FileProblem(path, f"is damaged, or no safetensors file ({error})", "copy it again") from None


def _import_safetensors(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError("safetensors: is not installed; pip install 'sas-megatron[export]'") from None
