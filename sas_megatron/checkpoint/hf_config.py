"""The config.json of Hugging Face models, including models that this package exports with its own code.

Fields are read in the spelling of transformers 4 or 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.checkpoint.hf_fields import SizeFields
from sas_megatron.checkpoint.weights_source import describe_architecture
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.model import ModelConfig
from sas_megatron.io.file_records import parse_json, read_regular_file

_REQUIRED = object()

# Fields of the section `model` -> fields of `SASMegatronConfig`.
_NATIVE_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "activation": "activation",
    "normalization": "normalization",
    "norm_epsilon": "norm_epsilon",
    "linear_bias": "linear_bias",
    "rotary_base": "rotary_base",
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}


class HFConfig:
    """The fields of a config.json by name.

    Raises:
        FileProblem: The folder has no config.json, or it cannot be read.
        FieldError: The model is quantized.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        try:
            fields = parse_json(read_regular_file(self.path))
        except (OSError, ValueError) as error:
            raise FileProblem(
                self.path, f"cannot be read ({error})", "name the folder of a Hugging Face model"
            ) from None
        if not isinstance(fields, dict):
            raise FileProblem(self.path, "is not a JSON object", "name the folder of a Hugging Face model")
        self.fields: dict[str, Any] = fields
        self.require("quantization_config", None)

    def get(self, name: str, default: Any = _REQUIRED) -> Any:
        """Return the value of a field.

        Raises:
            FileProblem: The field is missing and no default was given.
        """
        if name in self.fields:
            return self.fields[name]
        if default is _REQUIRED:
            raise FileProblem(
                self.path, f"has no field {name}", "name the folder of a complete Hugging Face model"
            )
        return default

    def check_fields(self, section: type[SizeFields]) -> None:
        """Check the types and ranges of the fields that a format has.

        Raises:
            FieldError: A field has another type or is out of range; the error names the first one.
            FileProblem: A field is missing.
        """
        try:
            section.model_validate(self.fields)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, problem["loc"]))
            if problem["type"] == "missing":
                self.get(name)
            rule = problem["msg"].removeprefix("Input should be ")
            raise FieldError(
                f"{self.path}: {name}",
                repr(problem["input"]),
                f"must be {rule}",
                "correct it, or copy the model again",
            ) from None
        except FieldError as error:
            raise FieldError(f"{self.path}: {error.field}", error.value, error.rule, error.remedy) from None

    def require(self, name: str, expected: Any, *, default: Any = _REQUIRED) -> None:
        """Check that a field has the expected value, the only one that the native model can express.

        Args:
            name: The field.
            expected: The expected value.
            default: Value of a missing field; if not given, a missing field is accepted.

        Raises:
            FieldError: The field has another value.
        """
        value = self.get(name, expected if default is _REQUIRED else default)
        if value != expected:
            raise self._not_supported(name, value, expected)

    def read_choice(self, name: str, native_names: dict[str, str], *, default: str) -> str:
        """Return the native name of a field's value; `default` is the value of a missing field.

        Raises:
            FieldError: The value has no native name.
        """
        value = self.get(name, default)
        if value not in native_names:
            raise self._not_supported(name, value, f"one of {', '.join(native_names)}")
        return native_names[value]

    def read_sizes(self) -> dict[str, int]:
        """Return the sizes of the section `model`, whose fields have the same names in most formats.

        Raises:
            FileProblem: A field is missing.
        """
        return {
            "num_layers": self.get("num_hidden_layers"),
            "hidden_size": self.get("hidden_size"),
            "ffn_hidden_size": self.get("intermediate_size"),
            "vocab_size": self.get("vocab_size"),
        }

    def read_rotary_embedding(
        self, base_field: str, *, fraction_field: str | None = None, default_fraction: float = 1.0
    ) -> tuple[int, float]:
        """Return the rotary base θ and the fraction of a head's features that are rotated.

        Args:
            base_field: Field for θ in transformers 4; transformers 5 uses `rope_parameters` instead.
            fraction_field: Field for the fraction in transformers 4, if the format has one.
            default_fraction: The fraction if no field contains it.

        Raises:
            FieldError: The native model cannot express the rotary embedding.
        """
        self.require("rope_scaling", None)
        parameters = self.get("rope_parameters", None) or {}
        kind = parameters.get("rope_type", "default")
        if kind != "default":
            raise self._not_supported("rope_parameters.rope_type", kind, "default")
        # transformers 5 writes null for a default.
        base = parameters.get("rope_theta") or self.get(base_field, 10000)
        if base != int(base):
            raise FieldError(
                f"{self.path}: {base_field}",
                base,
                "must be an integer, as model.rotary_base is",
                "import another model",
            )
        fraction = default_fraction
        if fraction_field is not None:
            stated = parameters.get("partial_rotary_factor")
            fraction = self.get(fraction_field, default_fraction) if stated is None else stated
        return int(base), fraction

    def _not_supported(self, name: str, value: object, expected: object) -> FieldError:
        return FieldError(
            f"{self.path}: {name}",
            value,
            f"must be {expected}: the models of this package support no other value",
            "import another model",
        )


def native_config(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """Return the fields of `SASMegatronConfig`, including the locations of its code.

    Raises:
        FieldError: The attention comes from another package, so an export does not contain its code.
    """
    if attention.kind not in KINDS:
        raise FieldError(
            "attention.kind",
            attention.kind,
            "comes from another package, whose code an export does not include",
            f"export one of {', '.join(KINDS)}",
        )
    return {
        "architectures": ["SASMegatronForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sas_megatron.SASMegatronConfig",
            "AutoModelForCausalLM": "modeling_sas_megatron.SASMegatronForCausalLM",
        },
        "model_type": "sas_megatron",
        **{hf_name: getattr(model, name) for name, hf_name in _NATIVE_FIELDS.items()},
        "num_attention_heads": attention.num_heads,
        "attention": describe_architecture(model, attention)["attention"],
        "cache_simulated_heads": isinstance(attention, SimulatedAttentionConfig)
        and attention.kv_cache == "simulated",
    }


def read_native_config(config: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Convert the config of an exported native model to the sections `model` and `attention`.

    Raises:
        FileProblem: A field is missing.
    """
    model = {name: config.get(hf_name) for name, hf_name in _NATIVE_FIELDS.items()}
    return model, config.get("attention")
