"""The formats in which a model is exported without model code, each a model class of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sas_megatron.checkpoint.gpt_neox import find_neox_obstacle, neox_config, to_neox
from sas_megatron.checkpoint.llama import find_obstacle, llama_config, to_llama
from sas_megatron.checkpoint.qwen import (
    find_qwen2_obstacle,
    find_qwen3_obstacle,
    qwen2_config,
    qwen3_config,
)
from sas_megatron.checkpoint.tensor_files import NamedTensors
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.model import ModelConfig


class ExportFormat(NamedTuple):
    """What a format cannot express, its config.json, and the conversion of full native weights to it."""

    find_obstacle: Callable[[ModelConfig, AttentionConfig], str | None]
    config_fields: Callable[[ModelConfig, AttentionConfig], dict[str, Any]]
    convert: Callable[[NamedTensors, AttentionConfig], NamedTensors]


# No model fits two of them.
_FORMATS = (
    ExportFormat(find_obstacle, llama_config, to_llama),
    ExportFormat(find_qwen2_obstacle, qwen2_config, to_llama),
    ExportFormat(find_qwen3_obstacle, qwen3_config, to_llama),
    ExportFormat(find_neox_obstacle, neox_config, to_neox),
)


def choose_format(model: ModelConfig, attention: AttentionConfig) -> tuple[ExportFormat | None, str | None]:
    """Return the format that can express a model, or None and the first field that Llama's format cannot."""
    for candidate in _FORMATS:
        if candidate.find_obstacle(model, attention) is None:
            return candidate, None
    return None, find_obstacle(model, attention)
