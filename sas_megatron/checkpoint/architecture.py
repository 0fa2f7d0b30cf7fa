"""What of a config decides the function that weights compute; no torch.

Kept beside weights, so that they are not read into a model that only has the same shapes.
"""

from __future__ import annotations

from typing import Any

from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.model import ModelConfig

Architecture = dict[str, dict[str, Any]]

# How training starts and regularizes, how the tables are padded, and other ways to compute the same.
_NOT_OF_THE_MODEL = {"init_std", "hidden_dropout", "vocab_multiple"}
_NOT_OF_THE_ATTENTION = {"initialization", "dropout", "backend", "exchange", "kernel", "kv_cache"}


def describe_architecture(model: ModelConfig, attention: AttentionConfig) -> Architecture:
    """The sections `model` and `attention` without what does not matter, all defaults filled in."""
    fields = attention.model_dump(mode="json", exclude=_NOT_OF_THE_ATTENTION)
    return {
        "model": model.model_dump(mode="json", exclude=_NOT_OF_THE_MODEL),
        "attention": fields | attention.resolved_fields(),
    }


def check_equal(
    found: Architecture, wanted: Architecture, *, ignoring: frozenset[str] = frozenset(), origin: object
) -> None:
    """Raises `FieldError` for the first field in which `wanted`, of a config, is not as `found`.

    Args:
        found: Of the weights.
        wanted: Of the config that is to have them.
        ignoring: Dotted fields that may differ.
        origin: Where the weights are.
    """
    for section, fields in wanted.items():
        for name, value in fields.items():
            there, field = found[section].get(name), f"{section}.{name}"
            if value != there and field not in ignoring:
                raise FieldError(
                    field, value, f"is {there} of the weights in {origin}", f"set {field}={there}"
                )


def check_same_rows(found: ModelConfig, wanted: ModelConfig, *, origin: object) -> None:
    """Raises `FieldError` where the tables of a config have other rows than those of the weights."""
    if wanted.padded_vocab_size != found.padded_vocab_size:
        raise FieldError(
            "model.vocab_multiple",
            wanted.vocab_multiple,
            f"gives {wanted.padded_vocab_size} rows, and the weights in {origin} have "
            f"{found.padded_vocab_size}",
            f"set model.vocab_multiple={found.vocab_multiple}",
        )
