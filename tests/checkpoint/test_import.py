"""Imported models have the logits of transformers; models that cannot be expressed are rejected by field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sas_megatron.checkpoint.export import export_model
from sas_megatron.checkpoint.importing import open_model, write_model
from sas_megatron.checkpoint.tensor_files import StoredTensors
from sas_megatron.checkpoint.weights_source import describe_architecture
from sas_megatron.config.errors import FieldError, FileProblem
from tests.checkpoint.transformers_models import MODELS, ROTARY_WIDTHS, config_of, save_random_model
from tests.checkpoint.unsharded_models import ATTENTIONS, PARTS, build_unsharded_weights, compute_logits
from tests.run_configs import small_config
from tests.small_data import SmallData
from tests.tolerances import assert_near


@pytest.mark.parametrize("name", MODELS)
def test_imported_models_have_the_logits_of_transformers(ranks: Any, tmp_path: Path, name: str) -> None:
    expected = save_random_model(name, tmp_path / "source")
    write_model(open_model(tmp_path / "source"), tmp_path / "imported", shard_bytes=30_000)
    assert len(list((tmp_path / "imported").glob("weights-*.safetensors"))) > 1
    config = config_of(tmp_path / "imported")
    assert config.attention.kind == ("gqa" if "group" in name else "mha")
    assert config.attention.rotary_width == ROTARY_WIDTHS.get(name, config.attention.head_dim)
    assert config.model.padded_vocab_size == 46, "no padding is needed"
    weights = dict(StoredTensors(tmp_path / "imported", stem="weights"))
    (logits,) = ranks(1).run(compute_logits, weights, config)
    assert_near(logits, expected, torch.float64, "logits")
    assert expected.std() > 0.05


@pytest.mark.parametrize(
    ("name", "embedding", "output"),
    [
        ("llama, biased and tied", "model.embed_tokens.weight", "lm_head.weight"),
        ("neox, tied", "gpt_neox.embed_in.weight", "embed_out.weight"),
    ],
    ids=["llama", "neox"],
)
def test_a_stored_output_layer_of_a_tied_model_must_equal_the_embedding(
    tmp_path: Path, name: str, embedding: str, output: str
) -> None:
    save_random_model(name, tmp_path / "source")
    stored = dict(StoredTensors(tmp_path / "source", stem="model"))
    without = dict(open_model(tmp_path / "source").tensors)
    stored[output] = stored[embedding].clone()
    for path in (tmp_path / "source").glob("model*"):
        path.unlink()
    safetensors.torch.save_file(stored, tmp_path / "source" / "model.safetensors")
    for key, tensor in open_model(tmp_path / "source").tensors:
        assert torch.equal(tensor, without.pop(key)), key
    assert not without
    stored[output][3, 5] += 1e-6
    safetensors.torch.save_file(stored, tmp_path / "source" / "model.safetensors")
    with pytest.raises(
        FieldError, match=rf"^tie_word_embeddings=True: means that {output} equals {embedding}, "
    ):
        list(open_model(tmp_path / "source").tensors)


def test_embeddings_are_padded_to_the_requested_multiple(ranks: Any, tmp_path: Path) -> None:
    expected = save_random_model("llama", tmp_path / "source")
    write_model(open_model(tmp_path / "source", vocab_multiple=16), tmp_path / "imported")
    config = config_of(tmp_path / "imported")
    assert config.model.padded_vocab_size == 48
    weights = dict(StoredTensors(tmp_path / "imported", stem="weights"))
    (logits,) = ranks(1).run(compute_logits, weights, config)
    assert_near(logits[..., :46], expected, torch.float64, "logits")
    assert not logits[..., 46:].any()


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_importing_an_export_gives_bit_identical_weights(
    ranks: Any, small_data: SmallData, tmp_path: Path, attention: str, parts: str
) -> None:
    config = small_config(
        attention=ATTENTIONS[attention],
        model={**PARTS[parts], "vocab_size": 512},
        data={"tokenizer": str(small_data.tokenizer)},
    )
    (weights,) = ranks(1).run(build_unsharded_weights, config, torch.float32)
    export_model(weights, config, folder=tmp_path / "source")
    imported = open_model(tmp_path / "source")
    tensors = dict(imported.tensors)
    assert tensors.keys() == weights.keys()
    assert all(torch.equal(tensors[name], weight) for name, weight in weights.items())
    found, expected = (describe_architecture(part.model, part.attention) for part in (imported, config))
    # The Llama format does not distinguish mqa from gqa with one group.
    assert found["attention"].pop("kind") in (expected["attention"].pop("kind"), "gqa")
    assert found == expected


REJECTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "model_type": (
        "llama",
        {"model_type": "mamba"},
        r"model_type=mamba: is not a supported format; import a model with one of",
    ),
    "activation": ("neox", {"hidden_act": "relu"}, r"hidden_act=relu: must be one of gelu, gelu_new, .*;"),
    "gate": ("llama", {"hidden_act": "gelu"}, r"hidden_act=gelu: must be silu: .*;"),
    "one bias": ("llama", {"attention_bias": True}, r"mlp_bias=False: must be True: .*;"),
    "other scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0}},
        r"rope_parameters.rope_type=yarn: must be one of default, linear, llama3: .*;",
    ),
    "other scaling in the older spelling": (
        "llama",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        r"rope_scaling.rope_type=dynamic: must be one of default, linear, llama3: .*;",
    ),
    "incomplete scaling": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
        r"rope_scaling.low_freq_factor=None: is required by rope_type llama3; correct it, or copy",
    ),
    "scaling below one": (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        r"rope_scaling.factor=0.5: must be greater than or equal to 1; correct it, or copy",
    ),
    "partly rotary": (
        "llama",
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        r"rope_parameters.partial_rotary_factor=0.5: must be 1.0: .*;",
    ),
    "sliding window": (
        "qwen2, grouped",
        {"use_sliding_window": True},
        r"use_sliding_window=True: must be False: .*;",
    ),
    "attention bias of qwen": (
        "qwen3, grouped",
        {"attention_bias": True},
        r"attention_bias=True: must be False: .*;",
    ),
    "broken base": (
        "llama",
        {"rope_parameters": {"rope_theta": 0.5}},
        r"rope_theta=0.5: must be an integer, as model.rotary_base is;",
    ),
    "quantized": (
        "llama",
        {"quantization_config": {"bits": 4}},
        r"quantization_config=.*: must be None",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_models_that_cannot_be_expressed_are_rejected_by_field(tmp_path: Path, case: str) -> None:
    name, changes, message = REJECTED[case]
    save_random_model(name, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(FieldError, match=message):
        open_model(tmp_path)


def test_fields_of_transformers_4_are_read(tmp_path: Path) -> None:
    for name in ("llama, other rotary base", "neox, partly rotary"):
        save_random_model(name, tmp_path / name)
        fields = json.loads((tmp_path / name / "config.json").read_text())
        fields.pop("rope_parameters", None)
        is_llama = name.startswith("llama")
        older = {"rope_theta": 500.0} if is_llama else {"rotary_emb_base": 500, "rotary_pct": 0.7}
        (tmp_path / name / "config.json").write_text(json.dumps({**fields, **older, "rope_scaling": None}))
        imported = open_model(tmp_path / name)
        assert imported.model.rotary_base == 500
        assert imported.attention.rotary_width == (6 if is_llama else 4)


def test_incomplete_and_damaged_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match=r"config.json: cannot be read \(.*\); name the folder of"):
        open_model(tmp_path)
    save_random_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(FileProblem, match=r"contains 9 tensors that its config does not describe \(model"):
        write_model(open_model(tmp_path), tmp_path / "imported")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FileProblem, match=r"has no tensor model.layers.2.input_layernorm.weight; name"):
        write_model(open_model(tmp_path), tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
    first = min(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-8])
    with pytest.raises(FileProblem, match=r"model-00001.*: is damaged, or not a safetensors file"):
        open_model(tmp_path)
    first.unlink()
    with pytest.raises(FileProblem, match=r"model-00001.*: does not exist; name a folder"):
        open_model(tmp_path)
