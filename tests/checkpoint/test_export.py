"""Exported models: transformers gives our logits, generates with and without its cache alike, and tokenizes alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.export import export_model
from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer import Tokenizer
from tests.checkpoint.whole_models import ATTENTIONS, PARTS, logits_of, whole_weights
from tests.model.model_parts import random_tokens
from tests.run_configs import small_config
from tests.small_data import SmallData
from tests.tolerances import assert_near

LLAMAS = ["mha", "gqa", "mqa"]


def config_of(attention: str, parts: str, small_data: SmallData) -> RunConfig:
    # The vocabulary is that of the tokenizer; 516 rows hold it.
    return small_config(
        attention=ATTENTIONS[attention],
        model={**PARTS[parts], "vocab_size": 512, "vocab_multiple": 12},
        data={"tokenizer": str(small_data.tokenizer)},
    )


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture
def exported(ranks: Any, small_data: SmallData, tmp_path: Path) -> Any:
    """Exports the model of an attention; gives its folder, its config and our logits."""

    def export(attention: str, parts: str, dtype: torch.dtype) -> tuple[Path, RunConfig, torch.Tensor]:
        config = config_of(attention, parts, small_data)
        (weights,) = ranks(1).run(whole_weights, config, dtype)
        (logits,) = ranks(1).run(logits_of, weights, config)
        done = export_model(weights, config, folder=tmp_path / "model", shard_bytes=40_000)
        return done.folder, config, logits

    return export


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_logits_are_ours(exported: Any, attention: str, parts: str) -> None:
    # A plain Llama's norms work in float32, whatever the model's type.
    dtype = torch.float32 if attention in LLAMAS and parts == "plain" else torch.float64
    folder, config, logits = exported(attention, parts, dtype)
    model = load(folder, dtype=dtype, trust_remote_code=True)
    theirs = model(random_tokens(config)).logits
    assert theirs.dtype == dtype
    assert theirs.shape[-1] == 512
    assert_near(theirs, logits[..., :512], dtype, "logits")
    assert logits.std() > 0.05


@pytest.mark.parametrize("attention", LLAMAS)
def test_plain_models_are_llamas_that_need_no_code_of_ours(exported: Any, attention: str) -> None:
    from transformers import LlamaForCausalLM

    folder, _, _ = exported(attention, "plain", torch.float32)
    assert isinstance(load(folder), LlamaForCausalLM)
    assert [path.name for path in folder.glob("*.py")] == ["tokenization_sas_megatron.py"]


@pytest.mark.parametrize("simulated", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_with_and_without_the_cache_agrees(
    exported: Any, attention: str, simulated: bool
) -> None:
    if simulated and not attention.startswith("sas"):
        pytest.skip("only SAS has another cache")
    folder, config, _ = exported(attention, "biased" if attention in LLAMAS else "plain", torch.float64)
    model = load(folder, dtype=torch.float64, trust_remote_code=True)
    for layer in model.decoder["layers"]:
        if simulated:
            layer.self_attention.keeps_simulated = True
    tokens = random_tokens(config)[:, :7]
    # The second prompt is shorter: it begins with padding.
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    by_cache = [
        model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=9,
            min_new_tokens=9,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    ]
    with_cache, without = (torch.stack(result.logits, dim=1) for result in by_cache)
    assert_near(with_cache, without, torch.float64, "logits of generated tokens")
    assert torch.equal(by_cache[0].sequences, by_cache[1].sequences)
    unpadded = model.generate(tokens[1:, 3:], max_new_tokens=9, min_new_tokens=9, do_sample=False)
    assert torch.equal(unpadded[0], by_cache[0].sequences[1, 3:])
