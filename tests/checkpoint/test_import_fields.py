"""A config.json with fields of wrong types, and tensors that do not fit it, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sas_megatron.checkpoint.importing import open_model, write_model
from sas_megatron.checkpoint.tensor_files import StoredTensors
from sas_megatron.config.errors import FieldError, FileProblem, UserError
from tests.fork_server import run_command
from tests.fuzzing.fixture_files import exported_model
from tests.fuzzing.inputs import write_files
from tests.fuzzing.small_models import small_models

MODELS = ("llama", "neox", "exported")
INTEGERS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FLOATS = {
    "llama": ("rms_norm_eps", "attention_dropout"),
    "neox": ("layer_norm_eps", "hidden_dropout", "attention_dropout", "rotary_pct", "rotary_emb_base"),
    "exported": ("norm_epsilon", "initializer_range"),
}
BOOLEANS = {
    "llama": ("tie_word_embeddings", "attention_bias", "mlp_bias"),
    "neox": ("tie_word_embeddings",),
    "exported": ("tie_word_embeddings", "linear_bias"),
}
WRONG_FIELDS = [
    (model, field, value)
    for model in MODELS
    for fields, values in (
        (INTEGERS, ("8", 8.5, [8], None, True, 0, -8, {}, 2**63)),
        (FLOATS[model], ("0.1", [0.1], None, {}, -1.0, float("nan"), float("inf"))),
        (BOOLEANS[model], ("true", 1, None, [], 0.0)),
    )
    for field in fields
    for value in values
]
WRONG_FIELDS += [
    ("llama", "num_key_value_heads", "1"),
    ("llama", "head_dim", [4]),
    ("llama", "rope_theta", "10000"),
    *(("llama", "rope_parameters", value) for value in ([], "default", 1, True)),
    *(("exported", "attention", value) for value in (None, [], "sas", 1)),
    *(("exported", field, value) for field in ("activation", "normalization") for value in (None, 1, [])),
]


def write_model_folder(name: str, folder: Path, **changes: Any) -> None:
    """Write a small model with other fields in its config.json."""
    files = exported_model() if name == "exported" else small_models()[name]
    fields = json.loads(files["config.json"]) | changes
    write_files(folder, {**files, "config.json": json.dumps(fields).encode()})


@pytest.mark.parametrize("name", MODELS)
def test_small_models_are_imported(tmp_path: Path, name: str) -> None:
    write_model_folder(name, tmp_path / "source")
    write_model(open_model(tmp_path / "source"), tmp_path / "imported")
    assert (tmp_path / "imported" / "weights.json").exists()


def test_a_field_of_a_wrong_type_is_refused_by_name(tmp_path: Path) -> None:
    for name in MODELS:
        write_model_folder(name, tmp_path / name)
    contents = {name: (tmp_path / name / "config.json").read_text() for name in MODELS}
    for name, field, value in WRONG_FIELDS:
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(contents[name]) | {field: value}))
        with pytest.raises(FieldError) as caught:
            open_model(tmp_path / name)
        assert str(caught.value).startswith(f"{path}: {field}="), (name, field, value)
        assert "must be" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_theta": "x"}},
            "rope_parameters.rope_theta='x': must be a valid number",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": 4}},
            "rope_parameters.rope_type=4: must be a valid string",
        ),
        (
            "neox",
            {"rope_parameters": {"partial_rotary_factor": 2.0}},
            "rope_parameters.partial_rotary_factor=2.0: must",
        ),
        ("llama", {"model_type": ["llama"]}, r"model_type=['llama']: is not a supported format; import"),
        ("llama", {"num_hidden_layers": 5000}, "gives model.num_layers=5000, which must be at most 4,096"),
        (
            "exported",
            {"activation": "relu"},
            "has an invalid value for activation: Input should be 'swiglu', ",
        ),
        (
            "exported",
            {"attention": {"kind": "mha"}},
            "has an invalid value for num_heads: Field required; name",
        ),
        (
            "exported",
            {"attention": {"kind": 7, "num_heads": 2}},
            "gives attention.kind=7, which is not a known",
        ),
    ],
)
def test_nested_fields_and_rules_of_the_native_model_name_the_file(
    tmp_path: Path, name: str, field: dict[str, Any], message: str
) -> None:
    write_model_folder(name, tmp_path, **field)
    with pytest.raises(UserError) as caught:
        open_model(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {message}")


@pytest.mark.parametrize(
    "content", [b"[]", b"1", b"null", b"[" * 100_000, b"\xff", b'[["model_type", "llama"]]']
)
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    write_model_folder("llama", tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(
        FileProblem, match=r"config.json: (cannot be read \(.*\)|is not a JSON object); name the"
    ):
        open_model(tmp_path)


def test_tensors_of_another_shape_or_type_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name, tensor_name in (
        ("llama", "model.layers.0.self_attn.k_proj.weight"),
        ("neox", "gpt_neox.layers.0.mlp.dense_h_to_4h.bias"),
        ("exported", "embedding.word_embeddings.weight"),
    ):
        folder = tmp_path / name
        write_model_folder(name, folder)
        stored = dict(StoredTensors(folder, stem="model"))
        for path in folder.glob("model*"):
            path.unlink()
        for changed, message in (
            (
                stored[tensor_name][1:],
                rf"has shape \[.*\] for {tensor_name}, but its config gives \[.*\]; copy",
            ),
            (stored[tensor_name].unsqueeze(0), rf"has shape \[1, .*\] for {tensor_name}, but its config"),
            (
                stored[tensor_name].to(torch.int64),
                rf"has the type I64 for {tensor_name}, which must be one of",
            ),
        ):
            tensors = {key: value.clone() for key, value in (stored | {tensor_name: changed}).items()}
            safetensors.torch.save_file(tensors, folder / "model.safetensors")
            with pytest.raises(FileProblem, match=message):
                open_model(folder)


def test_the_command_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    write_model_folder("llama", tmp_path / "source", num_attention_heads="2")
    done = run_command("checkpoint", "import", tmp_path / "source", "--output", tmp_path / "imported")
    assert done.returncode == 2
    assert done.stderr == (
        f"sas-megatron: error: {tmp_path}/source/config.json: num_attention_heads='2': must be a valid "
        "integer; correct it, or copy the model again\n"
    )
    assert not (tmp_path / "imported").exists()
