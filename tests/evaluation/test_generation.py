"""Generation: greedy texts by the definition, whatever batch, cache and layout; drawing; endings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.errors import FieldError, UserError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.evaluation.generation_settings import GenerationSettings, Sampling, encode_prompts
from tests import small_attentions as small
from tests.evaluation.trained_models import roughened_model
from tests.run_configs import small_config
from tests.selection import cases
from tests.small_data import SmallData

PROMPTS = ["import os", "d", "for name in names:\n    print(", "# a"]
CONTEXT = 40
SIMULATED = {**small.SAS, "kv_cache": "simulated"}


def config_of(small_data: SmallData, attention: small.Attention, **parallel: int) -> RunConfig:
    return small_config(
        attention=attention,
        model={"vocab_size": 512, "vocab_multiple": 12},
        data={"tokenizer": str(small_data.tokenizer), "sequence_length": CONTEXT},
        parallel=parallel,
    )


def generate_on_rank(config: RunConfig, settings: GenerationSettings) -> Any:
    from sas_megatron.evaluation.generation import generate

    tokenizer = Tokenizer(config.data.tokenizer)
    model = roughened_model(config, tokenizer, dtype=torch.float64)
    generated = generate(model, encode_prompts(PROMPTS, tokenizer, context=CONTEXT), settings)
    return [(done.tokens, done.text, done.finish) for done in generated.completions]


@torch.no_grad()
def likeliest_by_definition(config: RunConfig, num_new: int) -> list[list[int]]:
    """On the one rank: each prompt alone, the whole text read again for each token."""
    tokenizer = Tokenizer(config.data.tokenizer)
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
    "sas, simulated heads kept": (SIMULATED, 1, {}),
    "sas, tensor 2": (small.SAS, 2, {"tensor": 2}),
    "sas, simulated heads kept, tensor 2": (SIMULATED, 2, {"tensor": 2}),
    "sas, pipeline 2": (small.SAS, 2, {"pipeline": 2}),
    "sas, data 2": (small.SAS, 2, {}),
}


@pytest.mark.parametrize(
    "case",
    # Each layout once; the cache of every attention is in test_caching.py.
    cases(GREEDY, default=("mla", "sas, simulated heads kept, tensor 2", "sas, pipeline 2", "sas, data 2")),
)
def test_greedy_texts_are_those_of_the_definition(ranks: Any, small_data: SmallData, case: str) -> None:
    attention, world_size, parallel = GREEDY[case]
    (expected,) = ranks(1).run(likeliest_by_definition, config_of(small_data, attention), 30)
    assert {len(tokens) for tokens in expected} > {30}, "one of them fills the context"
    config, tokenizer = config_of(small_data, attention, **parallel), Tokenizer(small_data.tokenizer)
    for batch_tokens in (1, 10_000):
        settings = GenerationSettings(max_new_tokens=30, batch_tokens=batch_tokens)
        for found in ranks(world_size).run(generate_on_rank, config, settings):
            assert [tokens for tokens, _, _ in found] == expected
            assert [text for _, text, _ in found] == [tokenizer.decode(tokens) for tokens in expected]
            assert [finish for _, _, finish in found] == [
                "length" if len(tokens) == 30 else "full context" for tokens in expected
            ]


def test_what_is_drawn_depends_on_the_seed_and_not_on_batch_or_layout(
    ranks: Any, small_data: SmallData
) -> None:
    def drawn(world_size: int, seed: int, batch_tokens: int, **parallel: int) -> Any:
        settings = GenerationSettings(
            max_new_tokens=12,
            sampling=Sampling(temperature=1.0, top_p=0.95, seed=seed),
            batch_tokens=batch_tokens,
        )
        config = config_of(small_data, small.SAS, **parallel)
        return ranks(world_size).run(generate_on_rank, config, settings)

    ((one, *others),) = [drawn(1, 5, 1)]
    assert others == []
    assert drawn(1, 5, 10_000) == [one]
    assert drawn(2, 5, 10_000, tensor=2) == [one] * 2
    assert drawn(2, 5, 1) == [one] * 2
    assert drawn(1, 6, 1) != [one]


def test_texts_end_before_stop_strings_and_at_the_end_of_document(ranks: Any, small_data: SmallData) -> None:
    config = config_of(small_data, small.SAS)
    (greedy,) = ranks(1).run(generate_on_rank, config, GenerationSettings(max_new_tokens=20))
    text = greedy[2][1]
    # It spans tokens, begins within one, and is there twice.
    stop = text[7:10]
    settings = GenerationSettings(max_new_tokens=20, stop=(stop, "nowhere"))
    (stopped,) = ranks(1).run(generate_on_rank, config, settings)
    for (tokens, found, finish), (all_tokens, whole, _) in zip(stopped, greedy, strict=True):
        assert found == whole.partition(stop)[0]
        assert finish == ("stop string" if stop in whole else "length")
        assert tokens == all_tokens[: len(tokens)]
    (ended,) = ranks(1).run(end_at_once, config)
    eos_id = Tokenizer(small_data.tokenizer).eos_id
    assert ended == ([eos_id], "", "end of document"), "the token that ends documents has no text"


def end_at_once(config: RunConfig) -> Any:
    """On the one rank: generation where the end of document is always likeliest."""
    from sas_megatron.evaluation.generation import generate

    tokenizer = Tokenizer(config.data.tokenizer)
    model = roughened_model(config, tokenizer, dtype=torch.float64)
    logits = torch.zeros(1, 512)
    logits[:, tokenizer.eos_id] = 1.0
    model.whole_logits = lambda _hidden: logits
    (done,) = generate(model, [[5, 6]], GenerationSettings(max_new_tokens=20)).completions
    return done.tokens, done.text, done.finish


def test_draws_follow_the_probabilities_that_are_left() -> None:
    from sas_megatron.evaluation.sampling import build_generator, choose_tokens

    shares = torch.tensor([0.08, 0.4, 0.02, 0.3, 0.2])
    logits = (2.0 * shares.log()).expand(4_000, -1)
    generators = [build_generator(1, number) for number in range(len(logits))]

    def measured(**settings: Any) -> torch.Tensor:
        tokens = choose_tokens(logits, Sampling(temperature=2.0, **settings), generators)
        return tokens.bincount(minlength=5) / len(logits)

    def expected(*left: int) -> torch.Tensor:
        kept = torch.zeros(5)
        kept[list(left)] = shares[list(left)]
        return kept / kept.sum()

    for settings, left in (
        ({}, (0, 1, 2, 3, 4)),
        ({"top_k": 2}, (1, 3)),
        ({"top_p": 0.69}, (1, 3)),
        ({"top_p": 0.71}, (1, 3, 4)),
        ({"top_k": 3, "top_p": 0.7}, (1, 3)),  # of the three that are left they have 0.78
        ({"top_k": 1}, (1,)),
    ):
        # Five standard deviations of a share over so many draws.
        torch.testing.assert_close(measured(**settings), expected(*left), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "--temperature=-1.0: must be at least 0"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k=0: must be positive"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p=1.5: must be above 0 and at most 1"),
        ({"top_p": 0.9}, "--top-p=0.9: concerns drawing, and --temperature=0 takes the likeliest; set"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError) as refused:
        Sampling(**settings)
    assert str(refused.value).startswith(message)


def test_prompts_that_cannot_be_continued_are_refused(small_data: SmallData) -> None:
    tokenizer = Tokenizer(small_data.tokenizer)
    with pytest.raises(UserError, match="--prompt: none is given; give one"):
        encode_prompts([], tokenizer, context=CONTEXT)
    with pytest.raises(FieldError, match="--prompt='': prompt 2 is empty; give some text"):
        encode_prompts(["a", ""], tokenizer, context=CONTEXT)
    long = "0 1 2 3 4 5 6 7 8 9 " * 3
    with pytest.raises(
        FieldError, match=r"data.sequence_length=40 leaves no room behind it; shorten it, or set"
    ):
        encode_prompts([long], tokenizer, context=CONTEXT)
    with pytest.raises(FieldError, match=r"--stop='': is empty"):
        GenerationSettings(stop=("",))
    # As Python hands on an argument in another encoding.
    with pytest.raises(FieldError, match=r"--prompt='caf\\udce9': is no UTF-8; give"):
        encode_prompts(["a", "caf\udce9"], tokenizer, context=CONTEXT)
    with pytest.raises(FieldError, match=r"--stop='\\udce9': is no UTF-8; give"):
        GenerationSettings(stop=("a", "\udce9"))
    with pytest.raises(FieldError, match="--max-new-tokens=0: must be positive"):
        GenerationSettings(max_new_tokens=0)


def test_transformers_generates_the_same_from_the_export(
    ranks: Any, small_data: SmallData, tmp_path: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sas_megatron.checkpoint.export import export_model
    from tests.checkpoint.unsharded_models import whole_weights

    config = config_of(small_data, SIMULATED)
    (weights,) = ranks(1).run(whole_weights, config, torch.float64)
    done = export_model(weights, config, folder=tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float64, trust_remote_code=True)
    assert theirs.config.cache_simulated_heads, "as attention.kv_cache says"
    tokenizer = AutoTokenizer.from_pretrained(done.folder, trust_remote_code=True)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    tokens = theirs.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    (ours,) = ranks(1).run(generate_on_rank, config, GenerationSettings(max_new_tokens=12))
    assert tokens.tolist() == [found for found, _, _ in ours]
