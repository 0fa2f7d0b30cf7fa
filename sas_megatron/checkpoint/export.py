"""Export a model to a folder that transformers loads: weights, config, code, tokenizer and model card.

A model that a format of transformers can express (`export_formats`) needs no code from the folder. Other
models keep the native names of their weights and include the code in `remote_code`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sas_megatron.attention.sas import simulated_attention
from sas_megatron.checkpoint.export_formats import choose_format
from sas_megatron.checkpoint.hf_config import native_config
from sas_megatron.checkpoint.model_card import Export, write_card
from sas_megatron.checkpoint.tensor_files import (
    EMBEDDING_NAMES,
    SHARD_BYTES,
    NamedTensors,
    new_folder,
    write_tensors,
)
from sas_megatron.checkpoint.tokenizer_files import write_tokenizer
from sas_megatron.checkpoint.trained_run import open_fitting_tokenizer
from sas_megatron.config.errors import UserError
from sas_megatron.config.loading import dump_yaml
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.parameters import count_parameters
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.model import rotary_frequencies

_CODE = Path(__file__).parent / "remote_code"
_MODEL_CODE = (
    *(
        _CODE / f"{name}_sas_megatron.py"
        for name in ("attention", "attention_steps", "configuration", "modeling")
    ),
    Path(simulated_attention.__file__),
    Path(rotary_frequencies.__file__),
)


def export_model(
    weights: Mapping[str, torch.Tensor],
    config: RunConfig,
    *,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    origin: str = "weights in memory",
    shard_bytes: int = SHARD_BYTES,
) -> Export:
    """Export a model. In addition to `weights`, memory holds one file of weights at a time.

    Rows that pad the vocabulary are removed.

    Args:
        weights: All full weights by global name. Each is read once.
        config: Config of the run that trained them.
        folder: New folder.
        tokenizer: The tokenizer of the model; None opens that of the config.
        dtype: Type of the written weights; None keeps their type.
        origin: Location of the weights, for the model card.
        shard_bytes: Largest size of a file of weights.

    Raises:
        UserError: The weights do not match the config, or a file cannot be read or written.
    """
    tokenizer = tokenizer or open_fitting_tokenizer(
        config.data.tokenizer, config, remedy="name the tokenizer with which the model was trained"
    )
    export_format, obstacle = choose_format(config.model, config.attention)
    tensors = _remove_padding(weights, config, dtype)
    if export_format is None:
        fields = native_config(config.model, config.attention)
    else:
        fields = export_format.config_fields(config.model, config.attention)
        tensors = export_format.convert(tensors, config.attention)
    with new_folder(folder) as partial:
        weights_sha256 = write_tensors(partial, tensors, stem="model", shard_bytes=shard_bytes)
        written_dtype = dtype or next(iter(weights.values())).dtype
        fields |= _common_fields(config, tokenizer, written_dtype)
        _write_json(partial / "config.json", fields)
        _write_json(
            partial / "generation_config.json",
            {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id, "use_cache": True},
        )
        write_tokenizer(partial, tokenizer, config)
        for path in () if obstacle is None else _MODEL_CODE:
            shutil.copyfile(path, partial / path.name)
        resolved = dump_yaml(config)
        (partial / "training_config.yaml").write_text(resolved, encoding="utf-8")
        export = Export(
            folder=folder,
            model_class=fields["architectures"][0],
            obstacle=obstacle,
            origin=origin,
            weights_sha256=weights_sha256,
            config_sha256=hashlib.sha256(resolved.encode()).hexdigest(),
            tokenizer_sha256=tokenizer.sha256,
        )
        write_card(partial / "README.md", export, config)
    return export


def _common_fields(config: RunConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of config.json that all formats have."""
    return {
        "max_position_embeddings": config.data.sequence_length,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        # Documents end with this token. No token precedes them.
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }


def _remove_padding(
    weights: Mapping[str, torch.Tensor], config: RunConfig, dtype: torch.dtype | None
) -> NamedTensors:
    """Yield the weights as `dtype`, without padding rows.

    Raises:
        UserError: The number of parameters differs from that of the config.
    """
    total = 0
    for name in weights:
        tensor = weights[name]
        total += tensor.numel()
        if name in EMBEDDING_NAMES:
            tensor = tensor[: config.model.vocab_size]
        yield name, tensor if dtype is None else tensor.to(dtype)
    expected = sum(count_parameters(config).values())
    if total != expected:
        raise UserError(
            f"weights: have {total:,} parameters, but the config describes {expected:,}; use the config of "
            "the run that trained them"
        )


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
