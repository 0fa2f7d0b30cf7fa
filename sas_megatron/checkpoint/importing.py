"""Import Hugging Face models as unsharded weights from which training can start.

config.json, model*.safetensors  ->  weights*.safetensors   under global names
                                     weights.json           architecture, checksum and origin
                                     model.yaml             the sections `model` and `attention` of a config
tokenizer.json, tokenizer.model  ->  the same files
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationError

from sas_megatron.checkpoint.gpt_neox import from_neox, neox_shapes, read_neox_config
from sas_megatron.checkpoint.hf_config import HFConfig, read_native_config
from sas_megatron.checkpoint.hf_fields import (
    LlamaFields,
    NativeFields,
    NeoXFields,
    Qwen2Fields,
    Qwen3Fields,
    SizeFields,
)
from sas_megatron.checkpoint.llama import from_llama, llama_shapes, read_llama_config
from sas_megatron.checkpoint.qwen import read_qwen2_config, read_qwen3_config
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
from sas_megatron.config.attention import AttentionConfig, parse_attention
from sas_megatron.config.errors import FieldError, FileProblem, shorten
from sas_megatron.config.loading import dump_tree
from sas_megatron.config.model import ModelConfig
from sas_megatron.data.tokenizer import Tokenizer

# Default limit of model.vocab_multiple, a multiple of all usual tensor-parallel sizes.
_MAX_VOCAB_MULTIPLE = 128
# Tensors that old versions of transformers saved although they can be computed.
# Types of weights, as safetensors names them.
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


class _Format(NamedTuple):
    """A format of models: its fields, and how they and the tensors are converted."""

    fields: type[SizeFields]
    read: Callable[[HFConfig], Any]
    # The shapes of the stored tensors by name; tensors that are not listed may have any shape.
    list_shapes: Callable[[ModelConfig, AttentionConfig], dict[str, tuple[int, ...]]]
    convert: Callable[..., NamedTensors]


_FORMATS = {
    "llama": _Format(LlamaFields, read_llama_config, llama_shapes, from_llama),
    "qwen2": _Format(Qwen2Fields, read_qwen2_config, llama_shapes, from_llama),
    "qwen3": _Format(Qwen3Fields, read_qwen3_config, llama_shapes, from_llama),
    "gpt_neox": _Format(NeoXFields, read_neox_config, neox_shapes, from_neox),
    "sas_megatron": _Format(
        NativeFields,
        read_native_config,
        lambda model, _: dict.fromkeys(EMBEDDING_NAMES, (model.vocab_size, model.hidden_size)),
        lambda weights, *_: weights.items(),
    ),
}


def open_model(source: Path, *, vocab_multiple: int | None = None) -> UnshardedModel:
    """Open a Hugging Face model in the format of Llama, Qwen2, Qwen3 or GPT-NeoX, or one exported from here.

    Args:
        source: Folder of the model.
        vocab_multiple: The embedding is padded with zeros to a multiple of this number of rows. None selects
            the largest power of two up to 128 that requires no padding.

    Raises:
        UserError: The model cannot be read, or the native model cannot express it. The error names the field.
    """
    config = HFConfig(source)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FORMATS:
        raise FieldError(
            f"{config.path}: model_type",
            model_type,
            "is not a supported format",
            f"import a model with one of {list(_FORMATS)}",
        )
    found = _FORMATS[model_type]
    config.check_fields(found.fields)
    model_fields, attention_fields = found.read(config)
    multiple = vocab_multiple or math.gcd(model_fields["vocab_size"], _MAX_VOCAB_MULTIPLE)
    try:
        model = ModelConfig(**model_fields, vocab_multiple=multiple)
        attention = parse_attention(attention_fields)
    except ValidationError as error:
        problem = error.errors()[0]
        raise FileProblem(
            config.path,
            f"has an invalid value for {'.'.join(map(str, problem['loc']))}: {problem['msg']}",
            "name the folder of a complete Hugging Face model",
        ) from None
    except FieldError as error:
        raise FileProblem(
            config.path, f"gives {error.field}={shorten(error.value)}, which {error.rule}", error.remedy
        ) from None
    stored = StoredTensors(source, stem="model")
    _check_tensors(stored, found.list_shapes(model, attention))
    tracked = _TrackedTensors(stored)
    tensors = _pad_embeddings(tracked, found.convert(tracked, model, attention), model.padded_vocab_size)
    return UnshardedModel(model, attention, tensors, str(source.resolve()))


def write_model(
    unsharded_model: UnshardedModel,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> WeightsRecord:
    """Write unsharded weights, their record and their config sections into a new folder.

    Args:
        unsharded_model: The model.
        folder: New folder.
        tokenizer: The tokenizer of the model, whose files are written as well.
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
        for name, content in {} if tokenizer is None else tokenizer.files.items():
            (partial / name).write_bytes(content)
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


def _check_tensors(stored: StoredTensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check the shapes and types of stored tensors without reading them.

    Raises:
        FileProblem: A tensor has another shape than the config gives, or is not floating-point.
    """
    remedy = "copy the model again, or correct its config.json"
    for name in stored:
        if name.endswith(_NOT_WEIGHTS):
            continue
        shape = stored.shape(name)
        if shapes.get(name, shape) != shape:
            raise FileProblem(
                stored.folder,
                f"has shape {list(shape)} for {name}, but its config gives {list(shapes[name])}",
                remedy,
            )
        if stored.dtype(name) not in _FLOAT_TYPES:
            raise FileProblem(
                stored.folder,
                f"has the type {stored.dtype(name)} for {name}, which must be one of {list(_FLOAT_TYPES)}",
                remedy,
            )


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
            "import a model with the weights of a standard model of its type",
        )
