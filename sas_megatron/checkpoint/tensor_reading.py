"""Tensors in torch's distributed format, read by one process alone, without running code from the files."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from sas_megatron.checkpoint.manifest import DamagedCheckpoint

METADATA = ".metadata"
# Weights go by their global names; optimizer states by those behind this and their own name, as
# Megatron-core's do.
OPTIMIZER_PREFIX = "optimizer.state."
RANDOM_PREFIX = "random."


class TensorReader:
    """Reads tensors of one checkpoint, without any other rank."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = _Reader(folder)

    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors by name."""
        return {name: tuple(tensor.size) for name, tensor in self._tensors().items()}

    def whole(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        described = self._tensors()[name]
        tensor = torch.empty(described.size, dtype=described.properties.dtype)
        self.fill({name: tensor})
        return tensor

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Reads into `tensors`."""

        def read() -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load(
                    tensors,
                    storage_reader=self._reader,
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    no_dist=True,
                )

        self._reading(read)

    def _tensors(self) -> dict[str, Any]:
        metadata: Metadata = self._reading(self._reader.read_metadata)
        return dict(metadata.state_dict_metadata)

    def _reading(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (CheckpointException, OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DamagedCheckpoint(
                self._folder, f"is damaged: its tensors cannot be read ({reason})", "use another checkpoint"
            ) from error


class _Reader(FileSystemReader):
    """The default, but that reading runs no code from the file; it reads the metadata once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Where the tensors lie."""
        if self._metadata is None:
            data = (Path(self.path) / METADATA).read_bytes()
            try:
                self._metadata = _MetadataUnpickler(io.BytesIO(data)).load()
            except (pickle.UnpicklingError, AttributeError, ImportError, IndexError, TypeError) as error:
                raise ValueError(f"{METADATA}: {error}") from error
            if not isinstance(self._metadata, Metadata):
                raise ValueError(f"{METADATA}: describes no tensors")
        return self._metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Builds torch's descriptions of tensors and nothing else. (Tensors torch loads weights-only.)"""

    def find_class(self, module: str, name: str) -> Any:
        # A name with dots would lead on from what is named to whatever that can reach.
        if (module, name) in _DESCRIBING:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"names {module}.{name}, which is no description of a tensor")


_OF_TORCH = "torch.distributed.checkpoint.metadata"
# Not among them: what describes bytes, which torch would unpickle whatever they are (2.13).
_DESCRIBING = {
    (_OF_TORCH, "Metadata"),
    (_OF_TORCH, "MetadataIndex"),
    (_OF_TORCH, "StorageMeta"),
    (_OF_TORCH, "TensorStorageMetadata"),
    (_OF_TORCH, "ChunkStorageMetadata"),
    (_OF_TORCH, "TensorProperties"),
    (_OF_TORCH, "_MEM_FORMAT_ENCODING"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}
