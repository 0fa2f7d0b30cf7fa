"""Decoding with a cache gives the logits of the full forward pass: every attention, ranks, stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.checkpoint.whole_models import ATTENTIONS
from tests.evaluation.trained_models import random_texts, roughened_model, whole_logits
from tests.run_configs import small_config
from tests.tolerances import assert_near

# Prompts of unequal length, and what is decoded behind them: several tokens at once, then one by one.
PROMPT_LENGTHS, NEW_TOKENS, FIRST_NEW = [5, 1, 9], 6, 3


def config_of(attention: dict[str, Any], **parallel: int) -> RunConfig:
    return small_config(attention=attention, parallel=parallel)


@torch.no_grad()
def full_and_decoded(config: RunConfig, dtype: torch.dtype) -> Any:
    """On a rank: logits by the GPT itself, each text alone, and by decoding; the bytes kept of a token."""
    model = roughened_model(config, dtype=dtype)
    texts = random_texts(config, [length + NEW_TOKENS for length in PROMPT_LENGTHS])
    decoded, bytes_per_token = decode(model, texts)
    full = []
    for text in texts if config.parallel.pipeline == 1 else []:
        tokens = torch.tensor([text])
        positions = torch.arange(len(text))[None]
        full.append(model._model(tokens, positions, None, runtime_gather_output=True)[0])
    return full, decoded, bytes_per_token


def decode(model: Any, texts: list[list[int]]) -> Any:
    """Logits of each text's tokens in a batch; the shortest text leaves it before the end."""
    cache = model.new_cache(len(texts), max_tokens=max(map(len, texts)))
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    rows, read = list(range(len(texts))), [0] * len(texts)

    def take(numbers: list[int]) -> None:
        cache.begin_pass(max(numbers))
        tokens = torch.zeros(len(rows), max(numbers), dtype=torch.int64)
        for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            tokens[place, :number] = torch.tensor(texts[row][read[row] : read[row] + number])
            read[row] += number
        hidden = model.hidden_states(tokens, cache)
        cache.end_pass(numbers)
        if hidden is not None:
            logits = whole_logits(model, hidden)
            for place, (row, number) in enumerate(zip(rows, numbers, strict=True)):
                found[row].append(logits[:number, place])

    take(PROMPT_LENGTHS)
    take([FIRST_NEW, 1, FIRST_NEW - 1])
    while rows:
        left = [row for row in rows if read[row] < len(texts[row])]
        if left != rows:
            cache.keep([rows.index(row) for row in left])
            rows = left
        if rows:
            take([1] * len(rows))
    return [torch.cat(parts) for parts in found if parts], cache.bytes_per_token


CASES = {
    **ATTENTIONS,
    "sas-simulated": {**small.SAS, "kv_cache": "simulated"},
    "sas-grouped-simulated": {**ATTENTIONS["sas-grouped"], "kv_cache": "simulated"},
    "sas-all_to_all-simulated": {**small.SAS_GROUPED, "exchange": "all_to_all", "kv_cache": "simulated"},
    "sas-multi-query": {**small.SAS, "num_kv_heads": 1},
    "sas-only-features": {
        **small.SAS,
        **dict.fromkeys(("simulate_query_heads", "simulate_key_heads", "simulate_value_heads"), False),
    },
}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("attention", CASES)
def test_decoding_gives_the_logits_of_the_full_forward_pass(ranks: Any, attention: str, tensor: int) -> None:
    config = config_of(CASES[attention], tensor=tensor)
    for dtype in (torch.float64, torch.float32):
        ((full, _, kept), *_) = alone = ranks(1).run(full_and_decoded, config_of(CASES[attention]), dtype)
        by_rank = alone if tensor == 1 else ranks(tensor).run(full_and_decoded, config, dtype)
        for _, decoded, _ in by_rank:
            for text, (actual, expected) in enumerate(zip(decoded, full, strict=True)):
                assert_near(actual, expected, dtype, f"logits of text {text}")
        elements = config.model.num_layers * sum(config.attention.count_kv_cache_elements().values())
        assert kept == elements * dtype.itemsize


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("attention", ["sas", "sas-grouped-simulated"])
def test_so_does_decoding_of_a_model_whose_full_pass_runs_fused_kernels(
    ranks: Any, attention: str, tensor: int
) -> None:
    fused = {**CASES[attention], "kernel": "fused"}
    ((full, _, _),) = ranks(1).run(full_and_decoded, config_of(fused), torch.float32)
    for _, decoded, _ in ranks(tensor).run(full_and_decoded, config_of(fused, tensor=tensor), torch.float32):
        for text, (actual, expected) in enumerate(zip(decoded, full, strict=True)):
            assert_near(actual, expected, torch.float32, f"logits of text {text}")


@pytest.mark.parametrize("attention", ["gqa", "mla", "sas-grouped", "sas-simulated"])
def test_so_does_decoding_over_pipeline_stages(ranks: Any, attention: str) -> None:
    ((full, _, _),) = ranks(1).run(full_and_decoded, config_of(CASES[attention]), torch.float64)
    config = config_of(CASES[attention], tensor=2, pipeline=2)
    by_rank = ranks(4).run(full_and_decoded, config, torch.float64)
    assert [len(decoded) for _, decoded, _ in by_rank] == [0, 0, 3, 3], "the last stage has logits"
    for _, decoded, _ in by_rank[2:]:
        for text, (actual, expected) in enumerate(zip(decoded, full, strict=True)):
            assert_near(actual, expected, torch.float64, f"logits of text {text}")
