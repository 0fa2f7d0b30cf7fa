"""Generation: greedy texts for every batch size, cache and layout; sampling; ends of texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer_loading import load_tokenizer
from sas_megatron.evaluation.settings import GenerationSettings, Sampling, encode_prompts
from tests import small_attentions as small
from tests.evaluation.trained_models import roughened_model
from tests.run_configs import small_config
from tests.selection import cases
from tests.small_data import SmallData

PROMPTS = ["import os", "d", "for name in names:\n    print(", "# a"]
CONTEXT = 40
SIMULATED = {**small.SAS, "kv_cache": "simulated"}


def config_of(small_data: SmallData, attention: small.Attention, **parallel: int) -> RunConfig:
    """Return a small config with the tokenizer of `small_data`."""
    return small_config(
        attention=attention,
        model={"vocab_size": 512, "vocab_multiple": 12},
        data={"tokenizer": str(small_data.tokenizer), "sequence_length": CONTEXT},
        parallel=parallel,
    )


def generate_on_rank(config: RunConfig, settings: GenerationSettings) -> Any:
    """Return tokens, text and finish of each prompt."""
    from sas_megatron.evaluation.generation import generate

    tokenizer = load_tokenizer(config.data.tokenizer)
    model = roughened_model(config, tokenizer, dtype=torch.float64)
    generated = generate(model, encode_prompts(PROMPTS, tokenizer, context=CONTEXT), settings)
    return [(completion.tokens, completion.text, completion.finish) for completion in generated.completions]


@torch.no_grad()
def greedy_by_definition(config: RunConfig, num_new: int) -> list[list[int]]:
    """Return greedy tokens of each separate prompt, with a full forward pass per token. Runs on one rank."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    model = roughened_model(config, tokenizer, dtype=torch.float64)
    found = []
    for prompt in encode_prompts(PROMPTS, tokenizer, context=CONTEXT):
        text = list(prompt)
        while len(text) < min(len(prompt) + num_new, CONTEXT) and text[-1] != tokenizer.eos_id:
            tokens = torch.tensor([text])
            logits = model._model(tokens, torch.arange(len(text))[None], None)
            text.append(int(logits[0, -1, :512].argmax()))
        found.append(text[len(prompt) :])
    return found


GREEDY: dict[str, tuple[small.Attention, int, dict[str, int]]] = {
    "gqa": (small.GQA, 1, {}),
    "mla": (small.MLA, 1, {}),
    "sas": (small.SAS, 1, {}),
    "sas, simulated cache": (SIMULATED, 1, {}),
    "sas, tensor 2": (small.SAS, 2, {"tensor": 2}),
    "sas, simulated cache, tensor 2": (SIMULATED, 2, {"tensor": 2}),
    "sas, pipeline 2": (small.SAS, 2, {"pipeline": 2}),
    "sas, data 2": (small.SAS, 2, {}),
}


@pytest.mark.parametrize(
    "case",
    # The default run has each layout once. test_caching.py tests the cache of every attention.
    cases(GREEDY, default=("mla", "sas, simulated cache, tensor 2", "sas, pipeline 2", "sas, data 2")),
)
def test_greedy_texts_agree_with_full_forward_passes(ranks: Any, small_data: SmallData, case: str) -> None:
    attention, world_size, parallel = GREEDY[case]
    (expected,) = ranks(1).run(greedy_by_definition, config_of(small_data, attention), 30)
    assert {len(tokens) for tokens in expected} > {30}, "one text fills the context"
    config, tokenizer = config_of(small_data, attention, **parallel), load_tokenizer(small_data.tokenizer)
    for batch_tokens in (1, 10_000):
        settings = GenerationSettings(max_new_tokens=30, batch_tokens=batch_tokens)
        for found in ranks(world_size).run(generate_on_rank, config, settings):
            assert [tokens for tokens, _, _ in found] == expected
            assert [text for _, text, _ in found] == [tokenizer.decode(tokens) for tokens in expected]
            assert [finish for _, _, finish in found] == [
                "length" if len(tokens) == 30 else "full context" for tokens in expected
            ]


def test_samples_depend_on_the_seed_but_not_on_batch_or_layout(ranks: Any, small_data: SmallData) -> None:
    def sample(world_size: int, seed: int, batch_tokens: int, **parallel: int) -> Any:
        settings = GenerationSettings(
            max_new_tokens=12,
            sampling=Sampling(temperature=1.0, top_p=0.95, seed=seed),
            batch_tokens=batch_tokens,
        )
        config = config_of(small_data, small.SAS, **parallel)
        return ranks(world_size).run(generate_on_rank, config, settings)

    ((one, *others),) = [sample(1, 5, 1)]
    assert others == []
    assert sample(1, 5, 10_000) == [one]
    assert sample(2, 5, 10_000, tensor=2) == [one] * 2
    assert sample(2, 5, 1) == [one] * 2
    assert sample(1, 6, 1) != [one]


def test_texts_end_before_stop_strings_and_at_the_end_of_a_document(
    ranks: Any, small_data: SmallData
) -> None:
    config = config_of(small_data, small.SAS)
    (greedy,) = ranks(1).run(generate_on_rank, config, GenerationSettings(max_new_tokens=20))
    text = greedy[2][1]
    # The stop string spans several tokens, begins within one, and occurs twice.
    stop = text[7:10]
    settings = GenerationSettings(max_new_tokens=20, stop=(stop, "nowhere"))
    (stopped,) = ranks(1).run(generate_on_rank, config, settings)
    for (tokens, found, finish), (all_tokens, full_text, _) in zip(stopped, greedy, strict=True):
        assert found == full_text.partition(stop)[0]
        assert finish == ("stop string" if stop in full_text else "length")
        assert tokens == all_tokens[: len(tokens)]
    (ended,) = ranks(1).run(generate_end_of_document, config)
    eos_id = load_tokenizer(small_data.tokenizer).eos_id
    assert ended == ([eos_id], "", "end of document"), "the end-of-document token has no text"


def generate_end_of_document(config: RunConfig) -> Any:
    """Generate with logits for which the end of document is the most likely token. Runs on one rank."""
    from sas_megatron.evaluation.generation import generate

    tokenizer = load_tokenizer(config.data.tokenizer)
    model = roughened_model(config, tokenizer, dtype=torch.float64)
    logits = torch.zeros(1, 512)
    logits[:, tokenizer.eos_id] = 1.0
    model.full_logits = lambda _hidden: logits
    (completion,) = generate(model, [[5, 6]], GenerationSettings(max_new_tokens=20)).completions
    return completion.tokens, completion.text, completion.finish


def test_samples_follow_the_remaining_probabilities() -> None:
    from sas_megatron.evaluation.generation import build_generator, choose_tokens

    probabilities = torch.tensor([0.08, 0.4, 0.02, 0.3, 0.2])
    logits = (2.0 * probabilities.log()).expand(4_000, -1)
    generators = [build_generator(1, number) for number in range(len(logits))]

    def measured(**settings: Any) -> torch.Tensor:
        tokens = choose_tokens(logits, Sampling(temperature=2.0, **settings), generators)
        return tokens.bincount(minlength=5) / len(logits)

    def expected(*remaining: int) -> torch.Tensor:
        kept = torch.zeros(5)
        kept[list(remaining)] = probabilities[list(remaining)]
        return kept / kept.sum()

    for settings, remaining in (
        ({}, (0, 1, 2, 3, 4)),
        ({"top_k": 2}, (1, 3)),
        ({"top_p": 0.69}, (1, 3)),
        ({"top_p": 0.71}, (1, 3, 4)),
        ({"top_k": 3, "top_p": 0.7}, (1, 3)),  # They have 0.78 of the probability of the top 3.
        ({"top_k": 1}, (1,)),
    ):
        # Five standard deviations of a frequency over this number of samples.
        torch.testing.assert_close(measured(**settings), expected(*remaining), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature=-1.0: must be at least 0"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k=0: must be positive"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p=1.5: must be above 0 and at most 1"),
        (
            {"top_p": 0.9},
            "--top-p=0.9: has no effect with --temperature=0, which selects the most likely token; set",
        ),
    ],
)
def test_invalid_sampling_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError) as raised:
        Sampling(**settings)
    assert str(raised.value).startswith(message)


def test_invalid_prompts_are_rejected(small_data: SmallData) -> None:
    tokenizer = load_tokenizer(small_data.tokenizer)
    with pytest.raises(UserError, match="--prompt: is missing; give one"):
        encode_prompts([], tokenizer, context=CONTEXT)
    with pytest.raises(FieldError, match="--prompt='': prompt 2 is empty; give at least"):
        encode_prompts(["a", ""], tokenizer, context=CONTEXT)
    long = "0 1 2 3 4 5 6 7 8 9 " * 3
    with pytest.raises(
        FieldError, match=r"data.sequence_length=40 leaves no room for new tokens; shorten it, or set"
    ):
        encode_prompts([long], tokenizer, context=CONTEXT)
    with pytest.raises(FieldError, match=r"--stop='': is empty"):
        GenerationSettings(stop=("",))
    # Python represents arguments in another encoding in this way.
    with pytest.raises(FieldError, match=r"--prompt='caf\\udce9': is not UTF-8; give"):
        encode_prompts(["a", "caf\udce9"], tokenizer, context=CONTEXT)
    with pytest.raises(FieldError, match=r"--stop='\\udce9': is not UTF-8; give"):
        GenerationSettings(stop=("a", "\udce9"))
    with pytest.raises(FieldError, match="--max-new-tokens=0: must be positive"):
        GenerationSettings(max_new_tokens=0)


def test_transformers_generates_the_same_tokens_from_the_export(
    ranks: Any, small_data: SmallData, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sas_megatron.checkpoint.export import export_model
    from tests.checkpoint.unsharded_models import build_unsharded_weights

    config = config_of(small_data, SIMULATED)
    (weights,) = ranks(1).run(build_unsharded_weights, config, torch.float64)
    exported = export_model(weights, config, folder=tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(exported.folder, dtype=torch.float64, trust_remote_code=True)
    assert model.config.cache_simulated_heads, "attention.kv_cache=simulated"
    tokenizer = AutoTokenizer.from_pretrained(exported.folder, trust_remote_code=True)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    tokens = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    (native,) = ranks(1).run(generate_on_rank, config, GenerationSettings(max_new_tokens=12))
    assert tokens.tolist() == [found for found, _, _ in native]
