"""Read tensors in torch's distributed format, in a single process and without running code from the files."""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from typing_extensions import override

from sas_megatron.checkpoint.manifest import METADATA, DamagedCheckpoint, read_manifest
from sas_megatron.io.file_records import read_regular_file

# Weights are stored under their global names, optimizer states under this prefix, the name of the state and
# the global name, as in Megatron-core.
OPTIMIZER_PREFIX = "optimizer.state."
RANDOM_PREFIX = "random."
# Thousands of ranks with thousands of tensors need some hundred megabytes.
MAX_METADATA_BYTES = 2**30


class TensorReader:
    """Reads tensors of one checkpoint in this process.

    Its methods raise `DamagedCheckpoint` if the files cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = _Reader(folder)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the full tensors by name."""
        return {name: tuple(tensor.size) for name, tensor in self._tensors().items()}

    def read(self, name: str) -> torch.Tensor:
        """Return a full tensor."""
        metadata = self._tensors()[name]
        # Damaged metadata can have a shape that is too large for the memory.
        tensor: torch.Tensor = self._translate_errors(
            lambda: torch.empty(metadata.size, dtype=metadata.properties.dtype)
        )
        self.read_into({name: tensor})
        return tensor

    def read_into(self, tensors: dict[str, torch.Tensor]) -> None:
        """Read into `tensors`, in place. The values are full tensors or containers of local shards."""

        def load_tensors() -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load(
                    tensors,
                    storage_reader=self._reader,
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    no_dist=True,
                )

        self._translate_errors(load_tensors)

    def _tensors(self) -> dict[str, Any]:
        metadata: Metadata = self._translate_errors(self._reader.read_metadata)
        return dict(metadata.state_dict_metadata)

    def _translate_errors(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            raise DamagedCheckpoint(
                self._folder,
                f"is damaged: its tensors cannot be read ({_describe(error)})",
                "use another checkpoint",
            ) from error


def _describe(error: BaseException) -> str:
    """Return the reason of an error in one line; of torch's collected errors, that of the first one."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _stack = next(iter(error.failures.values()))
    return " ".join(str(error).split()) or type(error).__name__


class _Reader(FileSystemReader):
    """The default reader, except that it unpickles the metadata once and without running code."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the shapes of the tensors and the positions of their shards in the files.

        Raises:
            ValueError: The file does not contain tensor metadata.
        """
        if self._metadata is None:
            folder = Path(self.path)
            content = read_regular_file(folder / METADATA, max_bytes=MAX_METADATA_BYTES)
            try:
                metadata = _MetadataUnpickler(io.BytesIO(content)).load()
            except Exception as error:  # pickles made by hand can raise any
                raise ValueError(f"{METADATA}: {error}") from error
            if not isinstance(metadata, Metadata):
                raise ValueError(f"{METADATA}: does not contain tensor metadata")
            try:
                _check_metadata(metadata, files=set(read_manifest(folder).files))
            except (AttributeError, TypeError) as error:  # also made by hand
                raise ValueError(f"{METADATA}: {error}") from error
            self._metadata = metadata
        return self._metadata


def _check_metadata(metadata: Metadata, *, files: set[str]) -> None:
    """Check that every element of every tensor is in a file of the checkpoint's manifest.

    Raises:
        ValueError: Elements are missing, or in another file.
        AttributeError: An object has other fields than torch's.
        TypeError: A field has another type.
    """
    tensors: dict[str, Any] = metadata.state_dict_metadata
    for name, tensor in tensors.items():
        is_tensor = isinstance(tensor, TensorStorageMetadata)
        if not (is_tensor and isinstance(tensor.properties.dtype, torch.dtype)):
            raise TypeError(f"{name!r} is not described as a tensor")
        sizes = [tuple(chunk.sizes) for chunk in tensor.chunks]
        if sum(map(math.prod, sizes)) != math.prod(tensor.size):
            raise ValueError(f"{METADATA}: the shards of {name} do not make up its shape {list(tensor.size)}")
    for stored in metadata.storage_data.values():
        if stored.relative_path not in files:
            raise ValueError(f"{METADATA}: {stored.relative_path!r} is not a file of this checkpoint")
        if stored.offset < 0 or stored.length < 0:
            raise ValueError(f"{METADATA}: a shard in {stored.relative_path} has a negative position")


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles torch's tensor metadata and nothing else. (Torch loads the tensors with `weights_only`.)"""

    @override
    def find_class(self, module: str, name: str) -> Any:
        # Only complete names are allowed: a dotted name could reach any attribute of an allowed class.
        if (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"refers to {module}.{name}, which is not tensor metadata")


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
# BytesStorageMetadata is not among them: torch would unpickle any object in such entries (2.13).
_METADATA_CLASSES = {
    (_METADATA_MODULE, "Metadata"),
    (_METADATA_MODULE, "MetadataIndex"),
    (_METADATA_MODULE, "StorageMeta"),
    (_METADATA_MODULE, "TensorStorageMetadata"),
    (_METADATA_MODULE, "ChunkStorageMetadata"),
    (_METADATA_MODULE, "TensorProperties"),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
