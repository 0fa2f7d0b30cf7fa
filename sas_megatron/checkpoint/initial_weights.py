"""Weights of a checkpoint, or whole weights, into this rank's part of the model, before the first step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sas_megatron.checkpoint.loading import open_checkpoint, restore_tensors
from sas_megatron.checkpoint.sharded_tensors import shard_weights
from sas_megatron.checkpoint.tensor_files import TABLES, StoredTensors, WeightsDigest
from sas_megatron.checkpoint.weights_record import STEM, read_record
from sas_megatron.checkpoint.weights_source import find_weights
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.parameters import EMBEDDING_TERMS, count_parameters
from sas_megatron.distributed.error_agreement import on_first_rank, together
from sas_megatron.distributed.gathering import gather_from_ranks
from sas_megatron.model.initialization import full_shape, global_name, tensor_parallel_shard


def load_initial_weights(path: Path, pieces: list[Any], config: RunConfig) -> None:
    """Fills the freshly built pieces of this rank with what `checkpoint.initial_weights` may name.

    Every rank must call it.

    Raises:
        UserError: the weights are absent, damaged, or of another model; the same on every rank.
    """
    source = on_first_rank(lambda: find_weights(path, config))
    if source.is_checkpoint:
        restore_tensors(open_checkpoint(source.folder), shard_weights(pieces))
    else:
        _check_contents(source.folder)
        together(lambda: _fill_from_whole_weights(source.folder, pieces, config))


def _check_contents(folder: Path) -> None:
    """Raises `FileProblem` if they are not what was written; the ranks read each once between them."""

    def digest_own_share() -> list[str]:
        stored, digest = StoredTensors(folder, stem=STEM), WeightsDigest()
        by_size = sorted(stored, key=lambda name: (-math.prod(stored.shape(name)), name))
        for name in by_size[dist.get_rank() :: dist.get_world_size()]:
            digest.add(name, stored[name])
        return digest.lines

    by_rank = gather_from_ranks(together(digest_own_share))
    found = WeightsDigest([line for lines in by_rank for line in lines]).value()
    if found != read_record(folder).weights_sha256:
        raise FileProblem(
            folder,
            "holds other weights than were written (weights_sha256 in weights.json)",
            "import it again, or put it back from a copy",
        )


@torch.no_grad()
def _fill_from_whole_weights(folder: Path, pieces: list[Any], config: RunConfig) -> None:
    """Each tensor is read whole, and this rank's part of it kept: one whole tensor is held at a time."""
    stored = StoredTensors(folder, stem=STEM)
    _check_complete(stored, config)
    for piece in pieces:
        for name, parameter in piece.named_parameters():
            _copy_part(stored, global_name(piece, name), parameter)


def _check_complete(stored: StoredTensors, config: RunConfig) -> None:
    """By number, so that what no rank holds a part of is missed too."""
    tables = [name for name in TABLES if name in stored]
    unpadded = sum(math.prod(stored.shape(name)) for name in stored if name not in tables)
    expected = sum(count for term, count in count_parameters(config).items() if term not in EMBEDDING_TERMS)
    if unpadded != expected or len(tables) != (1 if config.model.tie_embeddings else 2):
        raise FileProblem(
            stored.folder,
            f"holds {len(tables)} tables and {unpadded:,} other parameters, of {expected:,} in the config",
            "import it again, whole",
        )


def _copy_part(stored: StoredTensors, name: str, parameter: torch.nn.Parameter) -> None:
    found, expected = stored.shape(name), tuple(full_shape(parameter))
    if found != expected:
        raise FileProblem(
            stored.folder,
            f"{name} is {list(found)}, and the config asks for {list(expected)}",
            "set model.vocab_multiple as in model.yaml there, or import it again with another"
            if name in TABLES
            else "import it again, whole",
        )
    parameter.copy_(tensor_parallel_shard(stored[name], parameter))
