"""Rate of scoring passages, against the bare forward pass of the same model."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from sas_megatron.benchmarks.timing import Preparation, median_ratio, time_alternately
from sas_megatron.config.run import RunConfig
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.distributed.topology import Topology
from sas_megatron.evaluation.scoring import Passage, score
from sas_megatron.evaluation.trained_model import TrainedModel
from sas_megatron.model.assembly import build_gpt_chunks

# Number of tokens, and of scored tokens at the end, as in multiple-choice tasks: ranges of random lengths.
CHOICE_LENGTHS, CHOICE_SCORED = (24, 160), (4, 24)


def measure_scoring(
    config: RunConfig, topology: Topology, *, num_tokens: int, batch_tokens: int, repeats: int
) -> dict[str, Any]:
    """Score random passages on one process, in alternation with bare passes over the same number of tokens.

    Args:
        config: A run of one process. Its model has random weights, and its tokenizer is not needed.
        topology: A world of one process.
        num_tokens: Tokens that the model reads in each measurement.
        batch_tokens: Tokens of a batch.
        repeats: Number of rounds after the warm-up rounds.

    Returns:
        For `choices` (passages of unequal length whose last tokens are scored) and `texts` (windows whose
        tokens are all scored): the median tokens per second of scoring and of bare passes, and the median
        ratio within rounds. A bare pass computes all logits of batches of the same mean length, without
        padding.
    """
    (gpt,) = build_gpt_chunks(config)
    model = TrainedModel(config, gpt, _NoTokenizer(), topology, step=0)
    kinds = {"choices": _choices(config, num_tokens), "texts": _texts(config, num_tokens)}
    preparations: dict[str, Preparation] = {}
    for kind, passages in kinds.items():
        preparations[f"{kind} scoring"] = functools.partial(_scoring, model, passages, batch_tokens)
        preparations[f"{kind} bare"] = functools.partial(
            _bare_passes, gpt, config, topology, passages, batch_tokens
        )
    seconds = time_alternately(preparations, device=topology.device, rounds=repeats)
    return {
        kind: _rates(passages, scoring=seconds[f"{kind} scoring"], bare=seconds[f"{kind} bare"])
        for kind, passages in kinds.items()
    }


class _NoTokenizer(Tokenizer):
    """A placeholder for the tokenizer of a model that only scores tokens."""

    def __init__(self) -> None: ...

    @override
    def encode_documents(self, documents: Sequence[bytes]) -> list[npt.NDArray[np.int32]]:
        raise NotImplementedError("the model only scores tokens")


def _rates(passages: Sequence[Passage], *, scoring: list[float], bare: list[float]) -> dict[str, float]:
    num_tokens = sum(len(passage.tokens) - 1 for passage in passages)
    return {
        "scoring": num_tokens / statistics.median(scoring),
        "bare": num_tokens / statistics.median(bare),
        "ratio": median_ratio(bare, scoring),
    }


def _scoring(model: TrainedModel, passages: Sequence[Passage], batch_tokens: int) -> Callable[[], None]:
    def action() -> None:
        score(model, passages, batch_tokens=batch_tokens, vocabulary=model.config.model.vocab_size)

    return action


def _bare_passes(
    model: Any, config: RunConfig, topology: Topology, passages: Sequence[Passage], batch_tokens: int
) -> Callable[[], None]:
    """Return an action that runs the GPT over batches with the total number of tokens of the passages."""
    num_tokens = sum(len(passage.tokens) - 1 for passage in passages)
    length = round(num_tokens / len(passages))
    num_rows = round(num_tokens / length)
    tokens = torch.randint(config.model.vocab_size, (num_rows, length), device=topology.device)
    positions = torch.arange(length, device=topology.device).expand_as(tokens)
    rows = max(1, batch_tokens // length)

    @torch.no_grad()
    def action() -> None:
        for batch, batch_positions in zip(tokens.split(rows), positions.split(rows), strict=True):
            model(batch, batch_positions, None)

    return action


def _choices(config: RunConfig, num_tokens: int) -> list[Passage]:
    random = np.random.default_rng(1)
    passages: list[Passage] = []
    while sum(len(passage.tokens) - 1 for passage in passages) < num_tokens:
        length = int(random.integers(*CHOICE_LENGTHS))
        passages.append(_random_passage(random, config, length, int(random.integers(*CHOICE_SCORED))))
    return passages


def _texts(config: RunConfig, num_tokens: int) -> list[Passage]:
    random = np.random.default_rng(2)
    length = config.data.sequence_length
    return [_random_passage(random, config, length + 1, length) for _ in range(max(1, num_tokens // length))]


def _random_passage(random: np.random.Generator, config: RunConfig, length: int, num_scored: int) -> Passage:
    tokens = random.integers(config.model.vocab_size, size=length, dtype=np.int32)
    return Passage(tokens, min(num_scored, length - 1))
