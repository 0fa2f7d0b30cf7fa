"""Import Hugging Face models as unsharded weights from which training can start.

config.json, model*.safetensors  ->  weights*.safetensors   under global names
                                     weights.json           architecture, checksum and origin
                                     model.yaml             the sections `model` and `attention` of a config
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError

from sas_megatron.checkpoint.gpt_neox import from_neox, read_neox_config
from sas_megatron.checkpoint.hf_config import HFConfig, read_native_config
from sas_megatron.checkpoint.llama import from_llama, read_llama_config
from sas_megatron.checkpoint.tensor_files import (
    EMBEDDING_NAMES,
    SHARD_BYTES,
    NamedTensors,
    StoredTensors,
    new_folder,
    write_tensors,
)
from sas_megatron.checkpoint.unsharded_weights import UnshardedModel
from sas_megatron.checkpoint.weights_source import STEM, WeightsRecord, describe_architecture
from sas_megatron.config.attention import parse_attention
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.loading import dump_tree
from sas_megatron.config.model import ModelConfig

# Default limit of model.vocab_multiple, a multiple of all usual tensor-parallel sizes.
_MAX_VOCAB_MULTIPLE = 128
# Tensors that old versions of transformers saved although they can be computed.
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


def open_model(source: Path, *, vocab_multiple: int | None = None) -> UnshardedModel:
    """Open a Hugging Face model in the Llama or GPT-NeoX format, or one that this package exported.

    Args:
        source: Folder of the model.
        vocab_multiple: The embedding is padded with zeros to a multiple of this number of rows. None selects
            the largest power of two up to 128 that requires no padding.

    Raises:
        UserError: The model cannot be read, or the native model cannot express it. The error names the field.
    """
    config = HFConfig(source)
    formats: dict[str, tuple[Callable[[HFConfig], Any], Callable[..., NamedTensors]]] = {
        "llama": (read_llama_config, from_llama),
        "gpt_neox": (read_neox_config, from_neox),
        "sas_megatron": (read_native_config, lambda weights, *_: weights.items()),
    }
    model_type = config.get("model_type")
    if model_type not in formats:
        raise FieldError(
            f"{config.path}: model_type",
            model_type,
            "is not a supported format",
            f"import a model with one of {list(formats)}",
        )
    read, convert = formats[model_type]
    model_fields, attention_fields = read(config)
    multiple = vocab_multiple or math.gcd(model_fields["vocab_size"], _MAX_VOCAB_MULTIPLE)
    try:
        model = ModelConfig(**model_fields, vocab_multiple=multiple)
        attention = parse_attention(attention_fields)
    except ValidationError as error:
        raise FileProblem(
            config.path, f"has an invalid value: {error}", "name the folder of a complete Hugging Face model"
        ) from None
    stored = _TrackedTensors(StoredTensors(source, stem="model"))
    tensors = _pad_embeddings(stored, convert(stored, model, attention), model.padded_vocab_size)
    return UnshardedModel(model, attention, tensors, str(source.resolve()))


def write_model(
    unsharded_model: UnshardedModel, folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> WeightsRecord:
    """Write unsharded weights, their record and their config sections into a new folder.

    Args:
        unsharded_model: The model.
        folder: New folder.
        shard_bytes: Largest size of a file of weights. Memory holds one file at a time.

    Raises:
        FileProblem: The folder exists already, or a file cannot be read or written.
    """
    with new_folder(folder) as partial:
        weights_sha256 = write_tensors(partial, unsharded_model.tensors, stem=STEM, shard_bytes=shard_bytes)
        record = WeightsRecord(
            architecture=describe_architecture(unsharded_model.model, unsharded_model.attention),
            weights_sha256=weights_sha256,
            origin=unsharded_model.origin,
        )
        record.write(partial)
        sections = {
            "model": unsharded_model.model.model_dump(mode="json"),
            "attention": unsharded_model.attention.model_dump(mode="json"),
        }
        (partial / "model.yaml").write_text(dump_tree(sections), encoding="utf-8")
    return record


class _TrackedTensors(Mapping[str, torch.Tensor]):
    """Tensors by name. `unread` holds the names that were not accessed yet."""

    def __init__(self, stored: StoredTensors) -> None:
        self.stored = stored
        self.unread = {name for name in stored if not name.endswith(_NOT_WEIGHTS)}

    def __getitem__(self, name: str) -> torch.Tensor:
        self.unread.discard(name)
        return self.stored[name]

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _pad_embeddings(
    stored: _TrackedTensors, tensors: NamedTensors, num_rows: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors, with embeddings padded to `num_rows`.

    Raises:
        FileProblem: The conversion did not access all stored tensors.
    """
    for name, tensor in tensors:
        added_rows = num_rows - len(tensor) if name in EMBEDDING_NAMES else 0
        yield name, F.pad(tensor, (0, 0, 0, added_rows)) if added_rows else tensor
    if stored.unread:
        examples = ", ".join(sorted(stored.unread)[:3])
        raise FileProblem(
            stored.stored.folder,
            f"contains {len(stored.unread)} tensors that its config does not describe ({examples} …)",
            "import a model with the weights of a standard Llama or GPT-NeoX",
        )
