"""Exported models: transformers gives our logits, with its cache and without, and our tokens."""

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
from sas_megatron.data.tokenizer import Tokenizer
from tests.checkpoint.whole_models import ATTENTIONS, PARTS, logits_of, whole_weights
from tests.fork_server import ForkedCommand
from tests.full_disk import no_file_longer_than
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


# SAS can keep its simulated heads too.
CACHES = [(name, False) for name in ATTENTIONS] + [
    (name, True) for name in ATTENTIONS if name.startswith("sas")
]


@pytest.mark.parametrize(("attention", "simulated"), CACHES)
def test_generation_with_and_without_the_cache_agrees(exported: Any, attention: str, simulated: bool) -> None:
    folder, config, _ = exported(attention, "biased" if attention in LLAMAS else "plain", torch.float64)
    options = {"cache_simulated_heads": True} if simulated else {}
    model = load(folder, dtype=torch.float64, trust_remote_code=True, **options)
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


@torch.no_grad()
def test_sas_keeps_what_it_is_told_to(exported: Any) -> None:
    folder, config, _ = exported("sas-grouped", "plain", torch.float64)
    kept = []
    for simulated in (False, True):
        model = load(folder, dtype=torch.float64, trust_remote_code=True, cache_simulated_heads=simulated)
        cache = model(random_tokens(config), use_cache=True).past_key_values
        kept.append([tuple(part.shape) for part in (cache.layers[0].keys, cache.layers[0].values)])
    # Base: G = 2 of D = 6 and 6 features. Simulated: r·G = 4 of E = 10 and D = 6.
    assert kept == [[(2, 2, 12, 6), (2, 2, 12, 6)], [(2, 4, 12, 10), (2, 4, 12, 6)]]


def test_the_loss_is_that_of_the_logits(exported: Any) -> None:
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


def test_the_tokenizer_gives_our_ids_and_gives_back_the_text(
    exported: Any, small_data: SmallData, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer(small_data.tokenizer)
    folder, _, _ = exported("mqa", "plain", torch.float32)
    theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "again")
    for tokenizer in (theirs, AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)):
        for text in REAL_TEXT:
            ids = tokenizer(text)["input_ids"]
            assert ids == ours.encode(text)
            assert tokenizer.decode(ids) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_id, ours.eos_id)
    assert len(theirs) == theirs.vocab_size == ours.vocab_size
    assert theirs.decode([*ours.encode("end"), ours.eos_id], skip_special_tokens=True) == "end"
    batch = theirs(["a", "longer text"], padding=True)
    assert batch["attention_mask"][0][0] == 0, "padding goes before"


def test_the_card_and_the_config_say_where_a_model_is_from(exported: Any) -> None:
    folder, config, _ = exported("sas", "plain", torch.float32)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "attention.kind=sas` is not of the Llama format" in card
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


def test_weights_of_another_config_are_refused(ranks: Any, small_data: SmallData, tmp_path: Path) -> None:
    config = config_of("mha", "plain", small_data)
    (weights,) = ranks(1).run(whole_weights, config, torch.float32)
    weights.pop("decoder.layers.1.mlp.linear_fc2.weight")
    with pytest.raises(UserError, match=r"weights: 27,380 parameters, and the config describes 27,940; give"):
        export_model(weights, config, folder=tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    other = small_config(data={"tokenizer": str(small_data.tokenizer)})
    with pytest.raises(FieldError, match=r"data.tokenizer=.*: has 512 tokens, and model.vocab_size=45; name"):
        export_model(weights, other, folder=tmp_path / "model")
    with pytest.raises(FileProblem, match="is there already; name a new folder"):
        export_model(weights, config, folder=tmp_path)


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    weights = {"some": torch.ones(7), "more": torch.ones(999)}
    with (
        no_file_longer_than(900),
        pytest.raises(FileProblem, match=r"cannot be written \(.*File too large.*\); make room"),
        new_folder(tmp_path / "model") as folder,
    ):
        write_tensors(folder, weights.items(), stem="model", shard_bytes=100)
    assert not list(tmp_path.iterdir())


def test_a_model_is_not_held_twice(small_data: SmallData, tmp_path: Path) -> None:
    process = ForkedCommand(
        *(small_data.tokenizer, tmp_path / "model"), module="tests.checkpoint.export_memory"
    )
    try:
        assert process.wait(timeout=200) == 0, process.errors()
    finally:
        process.kill()
    model_bytes, grown = map(int, process.output().split())
    assert model_bytes > 120_000_000
    # A shard of 8 MB, and what importing and Python take.
    assert grown < 40_000_000, f"{grown:,} bytes beside the model's {model_bytes:,}"
