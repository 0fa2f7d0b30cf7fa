"""Exported models: transformers computes the same logits and tokens, with and without its cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.checkpoint.export import export_model
from sas_megatron.checkpoint.tensor_files import StoredTensors, WeightsDigest, new_folder, write_tensors
from sas_megatron.config.errors import FieldError, FileProblem, UserError
from sas_megatron.config.loading import load_run_config
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer_loading import load_tokenizer
from tests.checkpoint.unsharded_models import ATTENTIONS, PARTS, build_unsharded_weights, compute_logits
from tests.fork_server import ForkedCommand
from tests.full_disk import no_file_longer_than
from tests.model.model_parts import random_tokens
from tests.run_configs import small_config
from tests.small_data import SmallData
from tests.tolerances import assert_near

LLAMAS = ["mha", "gqa", "mqa"]


def config_of(attention: str, parts: str, small_data: SmallData) -> RunConfig:
    """Return a config with the vocabulary of the tokenizer, 512 tokens, padded to 516 rows."""
    return small_config(
        attention=ATTENTIONS[attention],
        model={**PARTS[parts], "vocab_size": 512, "vocab_multiple": 12},
        data={"tokenizer": str(small_data.tokenizer)},
    )


def load(folder: Path, **options: Any) -> Any:
    """Load an exported model with transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture
def exported(ranks: Any, small_data: SmallData, tmp_path: Path) -> Any:
    """Return a function that exports a model and returns its folder, its config and the native logits."""

    def export(attention: str, parts: str, dtype: torch.dtype) -> tuple[Path, RunConfig, torch.Tensor]:
        config = config_of(attention, parts, small_data)
        (weights,) = ranks(1).run(build_unsharded_weights, config, dtype)
        (logits,) = ranks(1).run(compute_logits, weights, config)
        result = export_model(weights, config, folder=tmp_path / "model", shard_bytes=40_000)
        return result.folder, config, logits

    return export


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_transformers_computes_the_native_logits(exported: Any, attention: str, parts: str) -> None:
    # The norms of transformers' Llama compute in float32 for models of any type.
    dtype = torch.float32 if attention in LLAMAS and parts == "plain" else torch.float64
    folder, config, logits = exported(attention, parts, dtype)
    model = load(folder, dtype=dtype, trust_remote_code=True)
    found = model(random_tokens(config)).logits
    assert found.dtype == dtype
    assert found.shape[-1] == 512
    assert_near(found, logits[..., :512], dtype, "logits")
    assert logits.std() > 0.05


@pytest.mark.parametrize("attention", LLAMAS)
def test_llamas_are_exported_without_model_code(exported: Any, attention: str) -> None:
    from transformers import LlamaForCausalLM

    folder, _, _ = exported(attention, "plain", torch.float32)
    assert isinstance(load(folder), LlamaForCausalLM)
    assert [path.name for path in folder.glob("*.py")] == ["tokenization_sas_megatron.py"]


# The cache of SAS can hold base heads or simulated heads.
CACHES = [(name, False) for name in ATTENTIONS] + [
    (name, True) for name in ATTENTIONS if name.startswith("sas")
]


@pytest.mark.parametrize(("attention", "simulated"), CACHES)
def test_generation_with_and_without_the_cache_agrees(exported: Any, attention: str, simulated: bool) -> None:
    folder, config, _ = exported(attention, "biased" if attention in LLAMAS else "plain", torch.float64)
    options = {"cache_simulated_heads": True} if simulated else {}
    model = load(folder, dtype=torch.float64, trust_remote_code=True, **options)
    tokens = random_tokens(config)[:, :7]
    # The second prompt is shorter and is padded on the left.
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


@torch.no_grad()
def test_the_cache_of_sas_holds_base_or_simulated_heads(exported: Any) -> None:
    folder, config, _ = exported("sas-grouped", "plain", torch.float64)
    cached_shapes = []
    for simulated in (False, True):
        model = load(folder, dtype=torch.float64, trust_remote_code=True, cache_simulated_heads=simulated)
        cache = model(random_tokens(config), use_cache=True).past_key_values
        cached_shapes.append([tuple(part.shape) for part in (cache.layers[0].keys, cache.layers[0].values)])
    # Base: G = 2 heads with D = 6 features. Simulated: rG = 4 heads with E = 10 features, and D = 6 of
    # values.
    assert cached_shapes == [[(2, 2, 12, 6), (2, 2, 12, 6)], [(2, 4, 12, 10), (2, 4, 12, 6)]]


def test_the_loss_agrees_with_the_logits(exported: Any) -> None:
    folder, config, _ = exported("sas", "plain", torch.float64)
    model = load(folder, dtype=torch.float64, trust_remote_code=True)
    tokens = random_tokens(config)
    result = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(result.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_near(result.loss, expected, torch.float32, "loss")
    result.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


REAL_TEXT = [
    Path(json.__file__).read_text(encoding="utf-8"),
    "",
    " a  b\t\r\nc\u00a0\ufb01e\u0301\0\U0001f600 ",
    "▁a literal mark▁▁ and </s> and <unk> and <0x0A> ▁",
    "    \n\n   naïve — 東京 \u2028 ===== ----",
]


def test_the_exported_tokenizer_gives_the_native_ids_and_decodes_to_the_text(
    exported: Any, small_data: SmallData, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    native = load_tokenizer(small_data.tokenizer)
    folder, _, _ = exported("mqa", "plain", torch.float32)
    exported_tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    exported_tokenizer.save_pretrained(tmp_path / "again")
    for tokenizer in (
        exported_tokenizer,
        AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True),
    ):
        for text in REAL_TEXT:
            ids = tokenizer(text)["input_ids"]
            assert ids == native.encode(text)
            assert tokenizer.decode(ids) == text
    assert (exported_tokenizer.eos_token_id, exported_tokenizer.pad_token_id) == (
        native.eos_id,
        native.eos_id,
    )
    assert len(exported_tokenizer) == exported_tokenizer.vocab_size == native.vocab_size
    assert (
        exported_tokenizer.decode([*native.encode("end"), native.eos_id], skip_special_tokens=True) == "end"
    )
    batch = exported_tokenizer(["a", "longer text"], padding=True)
    assert batch["attention_mask"][0][0] == 0, "padding is on the left"


def test_the_model_card_contains_the_checksums(exported: Any) -> None:
    folder, config, _ = exported("sas", "plain", torch.float32)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "the Llama format has no `attention.kind=sas`" in card
    assert load_run_config(folder / "training_config.yaml") == config
    for file, digest in (("training_config.yaml", "config"), ("tokenizer.model", "tokenizer")):
        content = hashlib.sha256((folder / file).read_bytes()).hexdigest()
        assert content in card, digest
    stored = StoredTensors(folder, stem="model")
    weights = WeightsDigest()
    for name in reversed(list(stored)):
        weights.add(name, stored[name])
    assert weights.value() in card
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1


def test_weights_that_do_not_match_the_config_are_rejected(
    ranks: Any, small_data: SmallData, tmp_path: Path
) -> None:
    config = config_of("mha", "plain", small_data)
    (weights,) = ranks(1).run(build_unsharded_weights, config, torch.float32)
    weights.pop("decoder.layers.1.mlp.linear_fc2.weight")
    with pytest.raises(
        UserError, match=r"weights: have 27,380 parameters, but the config describes 27,940; use"
    ):
        export_model(weights, config, folder=tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    other = small_config(data={"tokenizer": str(small_data.tokenizer)})
    with pytest.raises(FieldError, match=r"data.tokenizer=.*: has 512 tokens, but model.vocab_size=45; name"):
        export_model(weights, other, folder=tmp_path / "model")
    with pytest.raises(FileProblem, match="exists already; name a new folder"):
        export_model(weights, config, folder=tmp_path)


def test_a_full_disk_is_reported_and_leaves_no_files(tmp_path: Path) -> None:
    weights = {"some": torch.ones(7), "more": torch.ones(999)}
    with (
        no_file_longer_than(900),
        pytest.raises(FileProblem, match=r"cannot be written \(.*File too large.*\); free space"),
        new_folder(tmp_path / "model") as folder,
    ):
        write_tensors(folder, weights.items(), stem="model", shard_bytes=100)
    assert not list(tmp_path.iterdir())


def test_exporting_does_not_copy_the_model_in_memory(small_data: SmallData, tmp_path: Path) -> None:
    process = ForkedCommand(
        *(small_data.tokenizer, tmp_path / "model"), module="tests.checkpoint.export_memory"
    )
    try:
        assert process.wait(timeout=200) == 0, process.errors()
    finally:
        process.kill()
    model_bytes, growth = map(int, process.output().split())
    assert model_bytes > 120_000_000
    # A file of 8 MB, and allocations of Python and imports.
    assert growth < 40_000_000, f"{growth:,} bytes in addition to the model's {model_bytes:,}"
