"""The config.json of Hugging Face models, including models that this package exports with its own code.

Fields are read in the spelling of transformers 4 or 5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.checkpoint.hf_fields import NativeFields, SizeFields
from sas_megatron.checkpoint.weights_source import describe_architecture
from sas_megatron.config.attention import AttentionConfig
from sas_megatron.config.attention_kinds import KINDS
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.model import ROTARY_SCALINGS, ModelConfig
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
    "parallel_residual": "parallel_residual",
    "rotary_base": "rotary_base",
    **{name: name for name in ("rotary_scaling", *ROTARY_SCALINGS["llama3"])},
    "init_std": "initializer_range",
    "tie_embeddings": "tie_word_embeddings",
}
# `rope_type` of transformers -> the fields of its parameters, with the fields of the section `model`.
_ROPE_TYPES: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rotary_scaling_factor"},
    "llama3": {
        "factor": "rotary_scaling_factor",
        "low_freq_factor": "rotary_low_frequency_factor",
        "high_freq_factor": "rotary_high_frequency_factor",
        "original_max_position_embeddings": "rotary_original_length",
    },
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
        if not isinstance(value, str) or value not in native_names:
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
    ) -> tuple[dict[str, Any], float]:
        """Return the fields `rotary_*` of the section `model`, and the fraction of rotated features.

        The spelling of transformers 4 has a field for θ, one for the fraction if the format has it, and
        `rope_scaling`; that of transformers 5 has `rope_parameters`.

        Args:
            base_field: Field for θ.
            fraction_field: Field for the fraction; None if the format rotates all features.
            default_fraction: The fraction if no field contains it.

        Raises:
            FieldError: The native model cannot express the rotary embedding.
        """
        # transformers 5 reads both in this order, and writes null for a default.
        name = "rope_scaling" if self.get("rope_scaling", None) else "rope_parameters"
        parameters = self.get(name, None) or {}
        base = parameters.get("rope_theta") or self.get(base_field, 10000)
        if base != int(base):
            raise FieldError(
                f"{self.path}: {base_field}",
                base,
                "must be an integer, as model.rotary_base is",
                "import another model",
            )
        fraction = parameters.get("partial_rotary_factor")
        if fraction_field is not None:
            fraction = self.get(fraction_field, default_fraction) if fraction is None else fraction
        elif fraction not in (None, 1):
            raise self._not_supported(f"{name}.partial_rotary_factor", fraction, 1.0)
        fields = {"rotary_base": int(base), **self._read_rotary_scaling(name, parameters)}
        return fields, default_fraction if fraction is None else fraction

    def _read_rotary_scaling(self, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the fields `rotary_scaling*` of the section `model`, from the field `name`."""
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in _ROPE_TYPES:
            raise self._not_supported(f"{name}.rope_type", kind, f"one of {', '.join(_ROPE_TYPES)}")
        # The original length, by its priority in transformers 5.
        length = "original_max_position_embeddings"
        lengths = (self.get(length, None), parameters.get(length), self.get("max_position_embeddings", None))
        known = {**parameters, length: next(filter(None, lengths), None)}
        for field in _ROPE_TYPES[kind]:
            if known.get(field) is None:
                raise FieldError(
                    f"{self.path}: {name}.{field}",
                    None,
                    f"is required by rope_type {kind}",
                    "correct it, or copy the model again",
                )
        fields = {ours: known[theirs] for theirs, ours in _ROPE_TYPES[kind].items()}
        return {"rotary_scaling": "none" if kind == "default" else kind, **fields}

    def _not_supported(self, name: str, value: object, expected: object) -> FieldError:
        return FieldError(
            f"{self.path}: {name}",
            value,
            f"must be {expected}: the models of this package support no other value",
            "import another model",
        )


def rope_scaling_fields(model: ModelConfig) -> dict[str, Any]:
    """Return `rope_scaling` in the spelling of transformers 4, which 5 and vLLM also read; {} if unscaled."""
    if model.rotary_scaling == "none":
        return {}
    parameters = {theirs: getattr(model, ours) for theirs, ours in _ROPE_TYPES[model.rotary_scaling].items()}
    return {"rope_scaling": {"rope_type": model.rotary_scaling, **parameters}}


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
    # Models that earlier versions exported lack fields that have defaults.
    fields = NativeFields.model_validate(config.fields)
    model = {name: getattr(fields, hf_name) for name, hf_name in _NATIVE_FIELDS.items()}
    return model, config.get("attention")
