"""Models of transformers come in with their logits; what our model cannot express is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.architecture import describe_architecture
from sas_megatron.checkpoint.export import export_model
from sas_megatron.checkpoint.importing import UnshardedModel, open_model, write_model
from sas_megatron.checkpoint.tensor_files import StoredTensors
from sas_megatron.config.errors import FieldError, FileProblem
from sas_megatron.config.loading import read_yaml
from sas_megatron.config.run import RunConfig
from tests.checkpoint.whole_models import ATTENTIONS, PARTS, logits_of, whole_weights
from tests.model.model_parts import random_tokens
from tests.run_configs import small_config
from tests.small_data import SmallData
from tests.tolerances import assert_near

SIZES: dict[str, Any] = {
    "vocab_size": 46,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    # Roughened: so that scores and gates leave their linear range.
    "initializer_range": 0.3,
    "eos_token_id": 1,
    "bos_token_id": None,
}
NEOX = {**SIZES, "use_parallel_residual": False, "rope_parameters": {"rope_type": "default"}}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES),
    "llama, grouped": ("Llama", {**SIZES, "num_key_value_heads": 2, "head_dim": 10}),
    "llama, biased and tied": (
        "Llama",
        {
            **SIZES,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
        },
    ),
    "llama, one group": ("Llama", {**SIZES, "num_key_value_heads": 1}),
    "llama, other rotary base": (
        "Llama",
        # As transformers 4 has it; 5 takes it, and saves it in `rope_parameters`.
        {**SIZES, "rope_theta": 500.0},
    ),
    "neox": ("GPTNeoX", {**NEOX, "rotary_pct": 1.0}),
    "neox, partly rotary": ("GPTNeoX", {**NEOX, "rotary_pct": 0.7, "layer_norm_eps": 1e-3}),
    "neox, tied": ("GPTNeoX", {**NEOX, "rotary_pct": 0.7, "tie_word_embeddings": True}),
}


# Where not all 6 features turn: ⌊0.7·6⌋.
ROTARY_WIDTHS = {"neox, partly rotary": 4, "neox, tied": 4}


@torch.no_grad()
def saved(name: str, folder: Path) -> torch.Tensor:
    """Saves a random model of transformers in float64; returns its logits of `random_tokens`."""
    import transformers

    family, fields = MODELS[name]
    torch.manual_seed(3)
    # Its own copy: transformers fills in what is absent, in place.
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(fields))
    model = getattr(transformers, f"{family}ForCausalLM")(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="20KB")
    for module in model.modules():
        # Llama's own works in float32 whatever the type of the model.
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = torch.nn.RMSNorm(24, eps=module.variance_epsilon).double().forward
            module.forward.__self__.weight = module.weight
    logits: torch.Tensor = model(random_tokens(config_of_vocabulary()), use_cache=False).logits
    return logits


def config_of_vocabulary() -> RunConfig:
    return small_config(model={"vocab_size": 46, "vocab_multiple": 2})


def config_of(folder: Path, **sections: Any) -> RunConfig:
    """A run with the sections that an import wrote."""
    written = read_yaml(folder / "model.yaml")
    return small_config(**{**written, **sections})


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(ranks: Any, tmp_path: Path, name: str) -> None:
    expected = saved(name, tmp_path / "theirs")
    write_model(open_model(tmp_path / "theirs"), tmp_path / "ours", shard_bytes=30_000)
    assert len(list((tmp_path / "ours").glob("weights-*.safetensors"))) > 1
    config = config_of(tmp_path / "ours")
    assert config.attention.kind == ("gqa" if "group" in name else "mha")
    assert config.attention.rotary_width == ROTARY_WIDTHS.get(name, config.attention.head_dim)
    assert config.model.padded_vocab_size == 46, "nothing is padded that need not be"
    weights = dict(StoredTensors(tmp_path / "ours", stem="weights"))
    (logits,) = ranks(1).run(logits_of, weights, config)
    assert_near(logits, expected, torch.float64, "logits")
    assert expected.std() > 0.05


def test_tables_are_padded_where_that_is_asked_for(ranks: Any, tmp_path: Path) -> None:
    expected = saved("llama", tmp_path / "theirs")
    write_model(open_model(tmp_path / "theirs", vocab_multiple=16), tmp_path / "ours")
    config = config_of(tmp_path / "ours")
    assert config.model.padded_vocab_size == 48
    weights = dict(StoredTensors(tmp_path / "ours", stem="weights"))
    (logits,) = ranks(1).run(logits_of, weights, config)
    assert_near(logits[..., :46], expected, torch.float64, "logits")
    assert not logits[..., 46:].any()


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_is_exported_comes_back_to_the_bit(
    ranks: Any, small_data: SmallData, tmp_path: Path, attention: str, parts: str
) -> None:
    config = small_config(
        attention=ATTENTIONS[attention],
        model={**PARTS[parts], "vocab_size": 512},
        data={"tokenizer": str(small_data.tokenizer)},
    )
    (weights,) = ranks(1).run(whole_weights, config, torch.float32)
    export_model(weights, config, folder=tmp_path / "theirs")
    whole: UnshardedModel = open_model(tmp_path / "theirs")
    again = dict(whole.tensors)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    found, expected = (describe_architecture(part.model, part.attention) for part in (whole, config))
    # A Llama does not say whether its one group is of mqa or of gqa.
    assert found["attention"].pop("kind") in (expected["attention"].pop("kind"), "gqa")
    assert found == expected


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "model_type": (
        "llama",
        {"model_type": "mamba"},
        r"model_type=mamba: is no format .*; use one of",
    ),
    "parallel": (
        "neox",
        {"use_parallel_residual": True},
        r"use_parallel_residual=True: cannot be expressed by this package's model, which needs False; take",
    ),
    "activation": ("neox", {"hidden_act": "gelu_new"}, r"hidden_act=gelu_new: cannot .* needs gelu;"),
    "gate": ("llama", {"hidden_act": "gelu"}, r"hidden_act=gelu: cannot .* needs silu;"),
    "one bias": ("llama", {"attention_bias": True}, r"mlp_bias=False: cannot .* needs True;"),
    "scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        r"rope_parameters.rope_type=linear: cannot .* needs default;",
    ),
    "old scaling": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3"}},
        r"rope_scaling=\{'rope_type': 'llama3'\}: cannot .* needs None;",
    ),
    "broken base": (
        "llama",
        {"rope_parameters": {"rope_theta": 0.5}},
        r"rope_theta=0.5: must be a whole number for model.rotary_base;",
    ),
    "quantized": (
        "llama",
        {"quantization_config": {"bits": 4}},
        r"quantization_config=.*: cannot",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_our_model_cannot_express_is_refused_by_name(tmp_path: Path, case: str) -> None:
    name, changes, message = REFUSED[case]
    saved(name, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(FieldError, match=message):
        open_model(tmp_path)


def test_the_spelling_of_transformers_4_is_read_too(tmp_path: Path) -> None:
    for name in ("llama, other rotary base", "neox, partly rotary"):
        saved(name, tmp_path / name)
        fields = json.loads((tmp_path / name / "config.json").read_text())
        fields.pop("rope_parameters", None)
        is_llama = name.startswith("llama")
        older = {"rope_theta": 500.0} if is_llama else {"rotary_emb_base": 500, "rotary_pct": 0.7}
        (tmp_path / name / "config.json").write_text(json.dumps({**fields, **older, "rope_scaling": None}))
        whole = open_model(tmp_path / name)
        assert whole.model.rotary_base == 500
        assert whole.attention.rotary_width == (6 if is_llama else 4)


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileProblem, match=r"config.json: cannot be read \(.*\); give the folder of"):
        open_model(tmp_path)
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(FileProblem, match=r"holds 9 tensors that its config does not speak of \(model"):
        write_model(open_model(tmp_path), tmp_path / "ours")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(FileProblem, match=r"has no tensor model.layers.2.input_layernorm.weight; make"):
        write_model(open_model(tmp_path), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    first = min(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-8])
    with pytest.raises(FileProblem, match=r"model-00001.*: is damaged, or no safetensors file"):
        open_model(tmp_path)
    first.unlink()
    with pytest.raises(FileProblem, match=r"model-00001.*: there is no such file; give a folder"):
        open_model(tmp_path)
