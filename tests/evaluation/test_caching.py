"""Decoding with a cache gives the logits of the full forward pass, for every attention and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sas_megatron.config.run import RunConfig
from sas_megatron.costs.attention import build_attention_costs
from tests import small_attentions as small
from tests.checkpoint.unsharded_models import ATTENTIONS
from tests.evaluation.trained_models import gather_logits, random_texts, roughened_model
from tests.run_configs import small_config
from tests.selection import cases, exhaustive
from tests.tolerances import assert_near

# Prompts of different lengths, followed by a pass over up to FIRST_NEW tokens and passes over one token.
PROMPT_LENGTHS, NEW_TOKENS, FIRST_NEW = [5, 1, 9], 6, 3


def config_of(attention: dict[str, Any], *, num_layers: int = 2, **parallel: int) -> RunConfig:
    """Return a small config with an attention and a layout."""
    return small_config(attention=attention, model={"num_layers": num_layers}, parallel=parallel)


@torch.no_grad()
def full_and_decoded(config: RunConfig, dtype: torch.dtype) -> Any:
    """Return the logits of the full pass per text, the logits of decoding, and the cache bytes per token."""
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
    """Return the logits of each text, decoded in a batch that shorter texts leave before the others."""
    cache = model.new_cache(len(texts), max_tokens=max(map(len, texts)))
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    rows, read = list(range(len(texts))), [0] * len(texts)

    def run_pass(numbers: list[int]) -> None:
        """Read the next `numbers[i]` tokens of text i of the batch."""
        cache.begin_pass(max(numbers))
        tokens = torch.zeros(len(rows), max(numbers), dtype=torch.int64)
        for index, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            tokens[index, :number] = torch.tensor(texts[row][read[row] : read[row] + number])
            read[row] += number
        hidden = model.hidden_states(tokens, cache)
        cache.end_pass(numbers)
        if hidden is not None:
            logits = gather_logits(model, hidden)
            for index, (row, number) in enumerate(zip(rows, numbers, strict=True)):
                found[row].append(logits[:number, index])

    run_pass(PROMPT_LENGTHS)
    run_pass([FIRST_NEW, 1, FIRST_NEW - 1])
    while rows:
        remaining = [row for row in rows if read[row] < len(texts[row])]
        if remaining != rows:
            cache.keep([rows.index(row) for row in remaining])
            rows = remaining
        if rows:
            run_pass([1] * len(rows))
    return [torch.cat(parts) for parts in found if parts], cache.bytes_per_token


CASES = {
    **ATTENTIONS,
    "sas-simulated": {**small.SAS, "kv_cache": "simulated"},
    "sas-grouped-simulated": {**ATTENTIONS["sas-grouped"], "kv_cache": "simulated"},
    "sas-all_to_all-simulated": {**small.SAS_GROUPED, "exchange": "all_to_all", "kv_cache": "simulated"},
    "sas-before-simulated": {**ATTENTIONS["sas-before"], "kv_cache": "simulated"},
    "sas-multi-query": {**small.SAS, "num_kv_heads": 1},
    "gqa-modified": {**small.GQA, **small.MODIFIERS},
    "mqa-modified": {**small.MQA, **small.MODIFIERS, "output_gate": "headwise"},
    "mfa-modified": {**small.MFA, **small.MODIFIERS},
    "sas-simulated-modified": {**small.SAS, **small.MODIFIERS, "kv_cache": "simulated"},
    "sas-before-modified": {**small.SAS, **small.MODIFIERS, "rotary": "before"},
    "sas-only-features": {
        **small.SAS,
        **dict.fromkeys(("simulate_query_heads", "simulate_key_heads", "simulate_value_heads"), False),
    },
}


# The other cases differ from these in queries, which are not cached, or combine features of two of these.
DEFAULT = [
    *("gqa-partly-rotary", "mqa", "mla", "mfa", "tpa", "sas-grouped", "sas-partly", "sas-multi-query"),
    *(
        "mha-modified",
        "gqa-modified",
        "mqa-modified",
        "diff-modified",
        "mla-modified",
        "mfa-modified",
        "tpa-modified",
    ),
    *("sas-modified", "sas-simulated-modified", "sas-before-modified"),
    *("sas-before", "sas-before-simulated", "mla-unrotated"),
    *("sas-simulated", "sas-grouped-simulated", "sas-all_to_all-simulated", "sas-only-features"),
]


def assert_decodes(by_rank: Any, full: Any, dtype: torch.dtype) -> None:
    """Check that decoding on each rank gives the logits `full` of each text."""
    for _, decoded, _ in by_rank:
        for text, (actual, expected) in enumerate(zip(decoded, full, strict=True)):
            assert_near(actual, expected, dtype, f"logits of text {text}")


def assert_cache_has_counted_bytes(by_rank: Any, config: RunConfig, dtype: torch.dtype) -> None:
    """Check the bytes per token on one rank against the elements that the config counts."""
    ((_, _, bytes_per_token),) = by_rank
    elements = config.model.num_layers * sum(
        build_attention_costs(config.attention).count_kv_cache_elements().values()
    )
    assert bytes_per_token == elements * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=exhaustive)])
@pytest.mark.parametrize("attention", cases(CASES, default=DEFAULT))
def test_decoding_gives_the_logits_of_the_full_forward_pass(
    ranks: Any, attention: str, dtype: torch.dtype
) -> None:
    config = config_of(CASES[attention])
    ((full, _, _),) = one_rank = ranks(1).run(full_and_decoded, config, dtype)
    assert_decodes(one_rank, full, dtype)
    assert_cache_has_counted_bytes(one_rank, config, dtype)
    assert_decodes(ranks(2).run(full_and_decoded, config_of(CASES[attention], tensor=2), dtype), full, dtype)


@pytest.mark.parametrize(
    ("attention", "tensor"),
    [
        ("sas", 1),  # The cache contains base heads.
        ("sas-grouped-simulated", 2),
        pytest.param("sas", 2, marks=exhaustive),
        pytest.param("sas-grouped-simulated", 1, marks=exhaustive),
    ],
)
def test_decoding_gives_the_logits_of_fused_kernels(ranks: Any, attention: str, tensor: int) -> None:
    fused = {**CASES[attention], "kernel": "fused"}
    config = config_of(fused, num_layers=1)
    ((full, _, _),) = by_rank = ranks(1).run(full_and_decoded, config, torch.float32)
    assert_cache_has_counted_bytes(by_rank, config, torch.float32)
    if tensor > 1:
        config = config_of(fused, num_layers=1, tensor=tensor)
        by_rank = ranks(tensor).run(full_and_decoded, config, torch.float32)
    assert_decodes(by_rank, full, torch.float32)


@pytest.mark.parametrize(
    "attention", cases(("gqa", "mla", "sas-grouped", "sas-simulated"), default=("mla", "sas-simulated"))
)
def test_decoding_over_pipeline_stages_gives_the_same_logits(ranks: Any, attention: str) -> None:
    ((full, _, _),) = ranks(1).run(full_and_decoded, config_of(CASES[attention]), torch.float64)
    config = config_of(CASES[attention], tensor=2, pipeline=2)
    by_rank = ranks(4).run(full_and_decoded, config, torch.float64)
    assert [len(decoded) for _, decoded, _ in by_rank] == [0, 0, 3, 3], "only the last stage has logits"
    assert_decodes(by_rank[2:], full, torch.float64)
