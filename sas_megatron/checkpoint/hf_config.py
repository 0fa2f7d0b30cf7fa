"""The config.json of a transformers model, read field by field, in the spelling of transformers 4 or 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sas_megatron.config.errors import FieldError, FileProblem

_REQUIRED = object()


class HFConfig:
    """Fields by name; what our model cannot express is refused by name.

    Raises:
        FileProblem: the folder has no config.json that can be read.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        try:
            self.fields: dict[str, Any] = dict(json.loads(self.path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise FileProblem(
                self.path, f"cannot be read ({error})", "give the folder of a transformers model"
            ) from None
        self.refuse_unless("quantization_config", None)

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """A field's value; without a default it must be there."""
        if name in self.fields:
            return self.fields[name]
        if default is _REQUIRED:
            raise FileProblem(self.path, f"has no field {name}", "give the folder of a whole model")
        return default

    def refuse_unless(self, name: str, expected: Any, *, default: Any = _REQUIRED) -> None:
        """Raises `FieldError` where a field is other than `expected`; absent, it is `default` or expected."""
        value = self.get(name, expected if default is _REQUIRED else default)
        if value != expected:
            raise FieldError(
                f"{self.path}: {name}",
                value,
                f"cannot be expressed by this package's model, which needs {expected}",
                "take another model",
            )

    def sizes(self) -> dict[str, int]:
        """The fields of our section `model` that most formats spell the same."""
        return {
            "num_layers": self.get("num_hidden_layers"),
            "hidden_size": self.get("hidden_size"),
            "ffn_hidden_size": self.get("intermediate_size"),
            "vocab_size": self.get("vocab_size"),
        }

    def rotary_positions(
        self, base_field: str, *, share_field: str | None = None, share: float = 1.0
    ) -> tuple[int, float]:
        """θ, and the share of a head's features that turn.

        Args:
            base_field: Where transformers 4 keeps θ; 5 has `rope_parameters` with all of it.
            share_field: Where transformers 4 keeps the share, if the format has one.
            share: What it is where no field says so.
        """
        self.refuse_unless("rope_scaling", None)
        parameters = self.get("rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            raise FieldError(
                f"{self.path}: rope_parameters.rope_type",
                kind,
                "cannot be expressed by this package's model, which needs default",
                "take another model",
            )
        base = parameters.get("rope_theta", self.get(base_field, 10000))
        if base != int(base):
            raise FieldError(
                f"{self.path}: {base_field}",
                base,
                "must be a whole number for model.rotary_base",
                "take another model",
            )
        if share_field is not None:
            share = parameters.get("partial_rotary_factor", self.get(share_field, share))
        return int(base), share
