"""Scores of passages agree with the logits of the model for every batch size and layout."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from sas_megatron.config.run import RunConfig
from tests import small_attentions as small
from tests.evaluation.trained_models import random_texts, roughened_model
from tests.rank_pool import RankPool
from tests.run_configs import small_config
from tests.selection import exhaustive

LENGTHS = [9, 2, 30, 17, 9, 12]
NUM_SCORED = [3, 1, 29, 1, 8, 5]
# Tokens in the vocabulary, which is padded to 48 rows.
VOCABULARY = 45


def passages_of(config: RunConfig) -> Any:
    """Return passages of different lengths, then the same with every last token, then one cut elsewhere."""
    from sas_megatron.evaluation.scoring import Passage

    texts = [np.array(text, dtype=np.int32) for text in random_texts(config, LENGTHS)]
    passages = [Passage(text, scored) for text, scored in zip(texts, NUM_SCORED, strict=True)]
    ends = [np.array([*text[:-1], token], dtype=np.int32) for text in texts for token in range(VOCABULARY)]
    return [*passages, *(Passage(text, 1) for text in ends), Passage(texts[-1], 11)]


def scores_on_rank(config: RunConfig, batch_tokens: int, dtype: torch.dtype) -> Any:
    """Score the passages with small portions of logits."""
    from sas_megatron.evaluation import scoring

    model = roughened_model(config, dtype=dtype)
    original, scoring.MAX_LOGITS = scoring.MAX_LOGITS, 7 * 48
    try:
        passages = passages_of(config)
        found = scoring.score(model, passages, batch_tokens=batch_tokens, vocabulary=VOCABULARY)
    finally:
        scoring.MAX_LOGITS = original
    return [(scores.log_probabilities, scores.are_most_likely) for scores in found]


@torch.no_grad()
def scores_by_definition(config: RunConfig, dtype: torch.dtype) -> Any:
    """Score each passage separately with the forward pass of the GPT. Runs on one rank."""
    model = roughened_model(config, dtype=dtype)
    expected = []
    for passage in passages_of(config):
        tokens = torch.from_numpy(passage.tokens).long()[None]
        positions = torch.arange(tokens.shape[1])[None]
        logits = model._model(tokens, positions, None)[0, -passage.num_scored - 1 : -1, :VOCABULARY]
        targets = tokens[0, -passage.num_scored :]
        logged = logits.double().log_softmax(-1)
        expected.append(
            (logged.gather(1, targets[:, None])[:, 0].numpy(), (logits.argmax(-1) == targets).numpy())
        )
    return expected


LAYOUTS = {
    "one rank": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "data 2": (2, {}),
    "pipeline 2": (2, {"pipeline": 2}),
    "tensor 2, pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "tensor 2, data 2": (4, {"tensor": 2}),
}


ATTENTIONS = {"sas": small.SAS_GROUPED, "mla": small.MLA}
# With these initial weights, each half of the vocabulary has most likely tokens.
SEED = {"seed": 3}
# One rank, and ranks of each kind of parallelism.
DEFAULT = [
    ("mla", "one rank"),
    ("sas", "data 2"),
    ("mla", "tensor 2, data 2"),
    ("sas", "tensor 2, pipeline 2"),
]


@functools.cache
def expected_scores(pool: RankPool, attention: str) -> Any:
    """Return the expected scores of an attention, computed once."""
    config = small_config(attention=ATTENTIONS[attention], training=SEED)
    (expected,) = pool.run(scores_by_definition, config, torch.float64)
    return expected


@pytest.mark.parametrize(
    ("attention", "layout"),
    [
        pytest.param(*case, marks=() if case in DEFAULT else exhaustive)
        for case in itertools.product(ATTENTIONS, LAYOUTS)
    ],
)
def test_scores_do_not_depend_on_layout_and_batch_size(ranks: Any, attention: str, layout: str) -> None:
    world_size, parallel = LAYOUTS[layout]
    expected = expected_scores(ranks(1), attention)
    config = small_config(attention=ATTENTIONS[attention], training=SEED, parallel=parallel)
    for batch_tokens in (1, 40, 1000):
        for found in ranks(world_size).run(scores_on_rank, config, batch_tokens, torch.float64):
            for (logged, most_likely), (expected_logged, expected_most_likely) in zip(
                found, expected, strict=True
            ):
                np.testing.assert_allclose(logged, expected_logged, rtol=1e-10)
                np.testing.assert_array_equal(most_likely, expected_most_likely)
    of_last_tokens = np.array([most_likely[0] for _, most_likely in expected[len(LENGTHS) : -1]])
    texts, tokens = np.nonzero(of_last_tokens.reshape(len(LENGTHS), VOCABULARY))
    assert texts.tolist() == list(range(len(LENGTHS)))
    assert tokens.min() < 24 <= tokens.max(), "each of two ranks has most likely tokens"


def most_likely_on_rank(config: RunConfig, logits: torch.Tensor) -> list[bool]:
    """Return whether each token is the most likely one in a single row of full logits."""
    from sas_megatron.evaluation.scoring import VocabularyShard

    shard = VocabularyShard(roughened_model(config), VOCABULARY)
    local = logits.chunk(config.parallel.tensor, dim=1)[shard._group.rank()]
    tokens = torch.arange(VOCABULARY)
    rows = torch.zeros_like(tokens)
    of_tokens = shard.logits_of(local, rows, tokens)
    return shard.are_most_likely(local, rows, tokens, of_tokens).tolist()


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_first_of_equally_likely_tokens_is_the_most_likely(ranks: Any, tensor: int) -> None:
    config = small_config(parallel={"tensor": tensor})
    for equal in ([7, 11, 30], [26, 40]):
        logits = torch.zeros(1, 48)
        logits[0, equal] = 1.0
        for found in ranks(tensor).run(most_likely_on_rank, config, logits):
            assert [token for token, is_most_likely in enumerate(found) if is_most_likely] == equal[:1]


def batches_on_rank(config: RunConfig, batch_tokens: int) -> Any:
    """Return the length and the passages of each row of each batch."""
    from sas_megatron.evaluation.scoring import fill_batches, read_rows

    batches = fill_batches(read_rows(passages_of(config)), batch_tokens)
    return [[(len(row.tokens), row.passages) for row in batch] for batch in batches]


def test_batches_are_sorted_and_bounded_and_contain_each_input_once(ranks: Any) -> None:
    (batches,) = ranks(1).run(batches_on_rank, small_config(), 34)
    of_rows = [[(length, numbers[0]) for length, numbers in batch] for batch in batches]
    assert of_rows == [[(29, 2)], [(16, 3), (11, 5)], [(8, 0), (8, 4), (1, 1)]]
    read = [number for batch in batches for _, numbers in batch for number in numbers]
    assert sorted(read) == list(range(len(LENGTHS) * (1 + VOCABULARY) + 1))
