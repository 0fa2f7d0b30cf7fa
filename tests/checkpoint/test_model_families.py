"""Pythia, Llama 3.1 and Qwen: tensor ranks and decoding, export to the same format, and upcycling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.export import export_model
from sas_megatron.checkpoint.importing import open_model, write_model
from sas_megatron.checkpoint.tensor_files import StoredTensors
from sas_megatron.checkpoint.upcycling import upcycle
from sas_megatron.checkpoint.weights_source import describe_architecture
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer_loading import load_tokenizer
from tests.checkpoint.transformers_models import (
    FAMILIES,
    MODELS,
    config_of,
    logits_in_float64,
    save_random_model,
)
from tests.checkpoint.unsharded_models import compute_logits, decode_logits
from tests.run_configs import small_config
from tests.selection import cases
from tests.small_data import SmallData
from tests.tolerances import assert_near

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor 1": {},
    "tensor 2": {"tensor": 2},
    "tensor 2, sequence": {"tensor": 2, "sequence": True},
}


@pytest.mark.parametrize(
    "case",
    cases(
        {f"{layout}-{name}": (layout, name) for layout in LAYOUTS for name in FAMILIES},
        default=(
            *(f"tensor 2-{name}" for name in ("pythia", "llama 3.1, grouped", "qwen2, grouped")),
            "tensor 2-qwen3, grouped",
            "tensor 2, sequence-pythia, scaled",
        ),
    ),
)
def test_tensor_ranks_and_decoding_give_the_logits_of_transformers(
    ranks: Any, tmp_path: Path, case: str
) -> None:
    layout, _, name = case.partition("-")
    expected = save_random_model(name, tmp_path / "source")
    write_model(open_model(tmp_path / "source"), tmp_path / "imported")
    config = config_of(tmp_path / "imported", parallel=LAYOUTS[layout])
    weights = dict(StoredTensors(tmp_path / "imported", stem="weights"))
    pool = ranks(config.parallel.tensor)
    for logits in pool.run(compute_logits, weights, config):
        assert_near(logits, expected, torch.float64, "logits")
    if not config.parallel.sequence:
        for logits in pool.run(decode_logits, weights, config):
            assert_near(logits, expected, torch.float64, "logits of decoding")


@pytest.mark.parametrize("name", MODELS)
def test_an_import_is_exported_to_the_same_format(small_data: SmallData, tmp_path: Path, name: str) -> None:
    import transformers

    expected = save_random_model(name, tmp_path / "source")
    imported = open_model(tmp_path / "source")
    config = run_of(imported.model, imported.attention)
    exported = export_model(
        dict(imported.tensors),
        config,
        folder=tmp_path / "exported",
        tokenizer=load_tokenizer(small_data.tokenizer),
    )
    assert exported.obstacle is None
    model = transformers.AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float64)
    assert type(model).__name__ == exported.model_class == f"{MODELS[name][0]}ForCausalLM"
    assert_near(logits_in_float64(model.eval()), expected, torch.float64, "logits of the export")
    again = open_model(exported.folder)
    assert describe_architecture(again.model, again.attention) == describe_architecture(
        imported.model, imported.attention
    )


@pytest.mark.parametrize("name", ["pythia, scaled", "llama 3.1, grouped", "qwen2, grouped", "qwen3, grouped"])
def test_an_upcycled_model_and_its_export_have_the_logits_of_transformers(
    ranks: Any, small_data: SmallData, tmp_path: Path, name: str
) -> None:
    import transformers

    expected = save_random_model(name, tmp_path / "source")
    imported = open_model(tmp_path / "source")
    fields = imported.attention.model_dump()
    config = run_of(
        imported.model,
        {
            **{field: fields[field] for field in ("num_heads", "num_kv_heads", "head_dim", "rotary_dim")},
            **{field: fields[field] for field in ("qkv_bias", "qk_norm")},
            "kind": "sas",
            "initialization": "identity",
            "simulated_head_dim": imported.attention.head_dim if imported.attention.qk_norm else None,
        },
    )
    weights = dict(upcycle(imported, config).tensors)
    (logits,) = ranks(1).run(compute_logits, weights, config)
    assert_near(logits, expected, torch.float64, "logits")
    (decoded,) = ranks(1).run(decode_logits, weights, config)
    assert_near(decoded, expected, torch.float64, "logits of decoding")
    folder = export_model(
        weights, config, folder=tmp_path / "exported", tokenizer=load_tokenizer(small_data.tokenizer)
    ).folder
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, trust_remote_code=True
    )
    assert type(model).__name__ == "SASMegatronForCausalLM"
    assert_near(logits_in_float64(model.eval()), expected, torch.float64, "logits of the export")


def run_of(model: Any, attention: Any) -> RunConfig:
    """Return a run with the sections of an imported model."""
    return small_config(
        model=model.model_dump(),
        attention=attention if isinstance(attention, dict) else attention.model_dump(),
    )


@pytest.mark.parametrize(("width", "head_dim"), [(58, 100), (30, 44), (16, 64), (6, 6)])
def test_the_fraction_of_rotated_features_survives_rounding(width: int, head_dim: int) -> None:
    """transformers multiplies and rounds down."""
    from sas_megatron.checkpoint.gpt_neox import neox_config

    config = small_config(
        model={"activation": "gelu"},
        attention={"kind": "mha", "num_heads": 4, "head_dim": head_dim, "rotary_dim": width},
    )
    fraction = json.loads(json.dumps(neox_config(config.model, config.attention)["rotary_pct"]))
    assert int(head_dim * fraction) == width
