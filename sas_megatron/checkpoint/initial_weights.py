"""Load initial weights, from a checkpoint or from unsharded weights, into the local model before step 1."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sas_megatron.checkpoint.restoring import open_checkpoint, restore_tensors
from sas_megatron.checkpoint.sharded_tensors import shard_weights
from sas_megatron.checkpoint.tensor_files import EMBEDDING_NAMES, StoredTensors, WeightsDigest
from sas_megatron.checkpoint.trained_run import offering_another_checkpoint
from sas_megatron.checkpoint.weights_source import STEM, find_weights, read_record, suggest_initial_weights
from sas_megatron.config.errors import FileProblem
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.parameters import EMBEDDING_TERMS, count_parameters
from sas_megatron.distributed.object_collectives import gather_from_ranks, raise_on_all_ranks, run_on_rank0
from sas_megatron.model.initialization import full_shape, global_name, tensor_parallel_shard


def load_initial_weights(path: Path, model_chunks: list[Any], config: RunConfig) -> None:
    """Load the weights at `path`, the value of `checkpoint.initial_weights`, into newly built model chunks.

    Every rank must call this function.

    Raises:
        UserError: The weights are missing, damaged, or of another model; the same on every rank.
    """
    source = run_on_rank0(lambda: find_weights(path, config))
    if source.is_checkpoint:
        with offering_another_checkpoint(source.folder, suggest_initial_weights):
            restore_tensors(open_checkpoint(source.folder), shard_weights(model_chunks))
    else:
        _verify_checksum(source.folder)
        raise_on_all_ranks(lambda: _load_unsharded_weights(source.folder, model_chunks, config))


def _verify_checksum(folder: Path) -> None:
    """Raise `FileProblem` if the weights do not match their record.

    All ranks together read each tensor once.
    """

    def hash_tensors_of_rank() -> list[str]:
        stored, digest = StoredTensors(folder, stem=STEM), WeightsDigest()
        by_size = sorted(stored, key=lambda name: (-math.prod(stored.shape(name)), name))
        for name in by_size[dist.get_rank() :: dist.get_world_size()]:
            digest.add(name, stored[name])
        return digest.lines

    lines_by_rank = gather_from_ranks(raise_on_all_ranks(hash_tensors_of_rank))
    found = WeightsDigest([line for lines in lines_by_rank for line in lines]).value()
    if found != read_record(folder).weights_sha256:
        raise FileProblem(
            folder,
            "contains weights that differ from what was written (weights_sha256 in weights.json)",
            "import the model again, or restore the folder from a copy",
        )


@torch.no_grad()
def _load_unsharded_weights(folder: Path, model_chunks: list[Any], config: RunConfig) -> None:
    """Read each tensor and copy its local shard; memory holds one full tensor at a time."""
    stored = StoredTensors(folder, stem=STEM)
    _check_num_parameters(stored, config)
    for model_chunk in model_chunks:
        for name, parameter in model_chunk.named_parameters():
            _copy_local_shard(stored, global_name(model_chunk, name), parameter)


def _check_num_parameters(stored: StoredTensors, config: RunConfig) -> None:
    """Raise `FileProblem` if the number of parameters differs from that of the config.

    Counting also detects missing tensors of which this rank holds no shard.
    """
    embeddings = [name for name in EMBEDDING_NAMES if name in stored]
    num_others = sum(math.prod(stored.shape(name)) for name in stored if name not in embeddings)
    expected = sum(count for term, count in count_parameters(config).items() if term not in EMBEDDING_TERMS)
    if num_others != expected or len(embeddings) != (1 if config.model.tie_embeddings else 2):
        raise FileProblem(
            stored.folder,
            f"contains {len(embeddings)} embedding or output tables and {num_others:,} other parameters, but "
            f"the config has {expected:,} other parameters",
            "import the complete model again",
        )


def _copy_local_shard(stored: StoredTensors, name: str, parameter: torch.nn.Parameter) -> None:
    shape, expected = stored.shape(name), tuple(full_shape(parameter))
    if shape != expected:
        raise FileProblem(
            stored.folder,
            f"has shape {list(shape)} for {name}, whose shape in this run is {list(expected)}",
            "set model.vocab_multiple as in its model.yaml, or import the model with another --vocab-multiple"
            if name in EMBEDDING_NAMES
            else "import the complete model again",
        )
    parameter.copy_(tensor_parallel_shard(stored[name], parameter))
