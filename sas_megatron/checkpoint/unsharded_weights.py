"""A checkpoint's whole weights, for whoever takes them elsewhere: one process, and no Megatron-core."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sas_megatron.checkpoint.manifest import CONFIG, verify_checkpoint
from sas_megatron.checkpoint.tensor_reading import OPTIMIZER_PREFIX, RANDOM_PREFIX, TensorReader
from sas_megatron.config.loading import read_yaml


class UnshardedWeights(Mapping[str, torch.Tensor]):
    """The whole weights of a checkpoint by global name, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._reader = TensorReader(path)
        self._shapes = {
            name: shape
            for name, shape in self._reader.sizes().items()
            if not name.startswith((OPTIMIZER_PREFIX, RANDOM_PREFIX))
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all weights, without reading them."""
        return dict(self._shapes)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._shapes:
            raise KeyError(name)
        return self._reader.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def load_unsharded_weights(path: Path) -> tuple[dict[str, Any], UnshardedWeights]:
    """A verified checkpoint's config, as plain mappings, and its whole weights; in one bare process.

    Needs neither process groups nor the layout that saved it. Tied embeddings are there once, by the
    name of the input's.

    Raises:
        DamagedCheckpoint: names the damaged files.
        FileProblem: its format is of another version.
    """
    verify_checkpoint(path)
    return read_yaml(path / CONFIG), UnshardedWeights(path)
