"""Models of transformers as whole weights that training starts from.

config.json, model*.safetensors  ->  weights*.safetensors   under our global names
                                     weights.json           what they are and where they are from
                                     model.yaml             the sections `model` and `attention` of a config
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError

from sas_megatron.checkpoint.architecture import describe_architecture
from sas_megatron.checkpoint.gpt_neox import from_neox, read_neox_config
from sas_megatron.checkpoint.hf_config import HFConfig
from sas_megatron.checkpoint.llama import from_llama, read_llama_config
from sas_megatron.checkpoint.native_format import read_native_config
from sas_megatron.checkpoint.tensor_files import (
    SHARD_BYTES,
    TABLES,
    NamedTensors,
    StoredTensors,
    new_folder,
    write_tensors,
)
from sas_megatron.checkpoint.weights_record import STEM, WeightsRecord
from sas_megatron.config.attention import AttentionConfig, parse_attention
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.loading import dump_tree
from sas_megatron.config.model import ModelConfig

# What of the vocabulary's divisors tensor ranks can use.
_USUAL_VOCAB_MULTIPLE = 128
# Not weights, but tables that old versions of transformers saved beside them.
_DERIVED = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


@dataclass(frozen=True)
class UnshardedModel:
    """The sections of a config, and the weights under our global names, each read when it is its turn."""

    model: ModelConfig
    attention: AttentionConfig
    tensors: NamedTensors
    origin: str


def open_model(source: Path, *, vocab_multiple: int | None = None) -> UnshardedModel:
    """A transformers model, of the Llama or the GPT-NeoX format, or exported by this package.

    Args:
        source: Its folder.
        vocab_multiple: The tables' rows are rounded up to a multiple of it, with zeros; None: the largest
            power of two up to 128 for which there is nothing to add.

    Raises:
        UserError: it cannot be read, or our model cannot express it; names the field.
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
            "is no format that is read here",
            f"use one of {list(formats)}",
        )
    read, convert = formats[model_type]
    model_fields, attention_fields = read(config)
    multiple = vocab_multiple or math.gcd(model_fields["vocab_size"], _USUAL_VOCAB_MULTIPLE)
    try:
        model = ModelConfig(**model_fields, vocab_multiple=multiple)
        attention = parse_attention(attention_fields)
    except ValidationError as error:
        raise FileProblem(
            config.path, f"has an unfit value: {error}", "give a whole model's folder"
        ) from None
    stored = _ReadTensors(StoredTensors(source, stem="model"))
    tensors = _all_of(stored, convert(stored, model, attention), model.padded_vocab_size)
    return UnshardedModel(model, attention, tensors, str(source.resolve()))


def write_model(whole: UnshardedModel, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> WeightsRecord:
    """Writes whole weights and what they are of into a new folder; memory holds one shard."""
    with new_folder(folder) as partial:
        weights_sha256 = write_tensors(partial, whole.tensors, stem=STEM, shard_bytes=shard_bytes)
        record = WeightsRecord(
            architecture=describe_architecture(whole.model, whole.attention),
            weights_sha256=weights_sha256,
            origin=whole.origin,
        )
        record.write(partial)
        sections = {
            "model": whole.model.model_dump(mode="json"),
            "attention": whole.attention.model_dump(mode="json"),
        }
        (partial / "model.yaml").write_text(dump_tree(sections), encoding="utf-8")
    return record


class _ReadTensors(Mapping[str, torch.Tensor]):
    """Tensors by name, with a record of which were asked for."""

    def __init__(self, stored: StoredTensors) -> None:
        self.stored = stored
        self.unread = {name for name in stored if not name.endswith(_DERIVED)}

    def __getitem__(self, name: str) -> torch.Tensor:
        self.unread.discard(name)
        return self.stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _all_of(
    stored: _ReadTensors, tensors: NamedTensors, table_rows: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors, tables with rows added; then raises `FileProblem` if some of those stored are left."""
    for name, tensor in tensors:
        added_rows = table_rows - len(tensor) if name in TABLES else 0
        yield name, F.pad(tensor, (0, 0, 0, added_rows)) if added_rows else tensor
    if stored.unread:
        some = ", ".join(sorted(stored.unread)[:3])
        raise FileProblem(
            stored.stored.folder,
            f"holds {len(stored.unread)} tensors that its config does not speak of ({some} …)",
            "give a model of plain Llama or GPT-NeoX form",
        )
