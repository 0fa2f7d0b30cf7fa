"""Held-out loss of documents and validation data with sliding windows, by length, domain and position.

    document -> end of document, its tokens, end of document -> windows, each `stride` tokens after the
    previous
      -> predictions of tokens that no earlier window predicted -> sums of losses by position in the window

Every token is predicted once, with the longest context that its window contains. The softmax includes the
rows that pad the vocabulary, as in training and its evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from sas_megatron.config.run import RunConfig
from sas_megatron.data.batches import build_validation_samples
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.data.validation_sets import UNNAMED, list_validation_sets
from sas_megatron.evaluation.held_out import HeldOutLoss
from sas_megatron.evaluation.results import describe_loss
from sas_megatron.evaluation.scoring import Passage, Scores, score
from sas_megatron.evaluation.settings import WindowSettings, windowed_config
from sas_megatron.evaluation.trained_model import TrainedModel

# Number of tokens in windows that are scored before more text is read.
TOKENS_PER_PORTION = 2**20
# Name of the loss over all domains.
ALL = "all"

# Cuts the text of a domain into windows according to the settings.
Domain = Callable[[WindowSettings], Iterable[Passage]]


def measure_held_out(
    model: TrainedModel, domains: Mapping[str, Domain], settings: Sequence[WindowSettings]
) -> dict[str, Any]:
    """Measure the loss of each domain for each window length. Every rank must make the same call.

    Args:
        model: The model.
        domains: Domains by name.
        settings: One entry per window length.

    Returns:
        The results as summary.json stores them, on every rank.
    """
    return {
        "trained_length": model.config.data.sequence_length,
        "by_length": [_measure_length(model, domains, of_length) for of_length in settings],
    }


def _measure_length(
    model: TrainedModel, domains: Mapping[str, Domain], settings: WindowSettings
) -> dict[str, Any]:
    begin = time.perf_counter()
    losses = {
        name: measure_windows(model, cut_domain(settings), batch_tokens=settings.batch_tokens)
        for name, cut_domain in domains.items()
    }
    total = sum(losses.values(), LossByPosition())
    return {
        "sequence_length": settings.length,
        "stride": settings.stride,
        "seconds": time.perf_counter() - begin,
        ALL: _describe(total),
        "domains": {name: _describe(loss) for name, loss in losses.items()},
    }


def _describe(loss: LossByPosition) -> dict[str, Any]:
    positions = [
        {"tokens_read": [last // 2 + 1, last], **describe_loss(of_bucket)}
        for last, of_bucket in loss.by_position()
    ]
    return {**describe_loss(loss.total()), "by_position": positions}


@dataclass
class LossByPosition:
    """Sums of losses by the number of preceding tokens in the window: 1, 2, 3–4, 5–8 and so on.

    `sums`, [buckets, 3], contains loss in nats, tokens and bytes. Bucket b covers up to 2^b preceding tokens.
    """

    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((64, 3)))

    def __add__(self, other: LossByPosition) -> LossByPosition:
        return LossByPosition(self.sums + other.sums)

    def add(self, window: Passage, scores: Scores, tokenizer: Tokenizer) -> None:
        """Add the predictions of a window.

        Args:
            window: The window.
            scores: Its scores.
            tokenizer: The tokenizer of the model.
        """
        num_read = np.arange(len(window.tokens) - window.num_scored, len(window.tokens))
        before, scored = (window.tokens[-window.num_scored - 1 : -1], window.tokens[-window.num_scored :])
        num_bytes = tokenizer.count_bytes(scored, before)
        terms = np.stack([-scores.log_probabilities, np.ones(window.num_scored), num_bytes], axis=1)
        np.add.at(self.sums, np.ceil(np.log2(num_read)).astype(np.int64), terms)

    def total(self) -> HeldOutLoss:
        """Return the loss over all positions."""
        return _to_held_out_loss(self.sums.sum(axis=0))

    def by_position(self) -> list[tuple[int, HeldOutLoss]]:
        """Return the largest number of preceding tokens and the loss of each bucket that is not empty."""
        return [(2**bucket, _to_held_out_loss(sums)) for bucket, sums in enumerate(self.sums) if sums[1] > 0]


def _to_held_out_loss(sums: npt.NDArray[np.float64]) -> HeldOutLoss:
    loss, num_tokens, num_bytes = sums.tolist()
    return HeldOutLoss(loss / num_tokens, int(num_tokens), int(num_bytes))


def measure_windows(model: TrainedModel, windows: Iterable[Passage], *, batch_tokens: int) -> LossByPosition:
    """Return the loss over windows, on every rank. Every rank must pass the same windows."""
    result = LossByPosition()
    for portion in _split_into_portions(windows):
        scores = score(
            model, portion, batch_tokens=batch_tokens, vocabulary=model.config.model.padded_vocab_size
        )
        for window, of_window in zip(portion, scores, strict=True):
            result.add(window, of_window, model.tokenizer)
    return result


def document_windows(
    documents: Iterable[str], tokenizer: Tokenizer, settings: WindowSettings
) -> Iterator[Passage]:
    """Cut each document into windows, as if another document had ended before it."""
    eos = tokenizer.eos_id
    for document in documents:
        yield from cut_windows(np.array([eos, *tokenizer.encode(document), eos], dtype=np.int32), settings)


def validation_windows(
    config: RunConfig, tokenizer: Tokenizer, *, length: int, name: str = UNNAMED
) -> Iterator[Passage]:
    """Yield the validation windows of a run. Every rank must call this function after joining the world.

    Args:
        config: Config of the run.
        tokenizer: Its tokenizer.
        length: Window length. With another length than in training, the total number of tokens is about
            equal.
        name: The validation set.

    Raises:
        UserError: As in `windowed_config`.
    """
    windowed = windowed_config(config, length)
    num_windows = windowed.evaluation.num_sequences
    data = list_validation_sets(windowed)[name]
    samples = build_validation_samples(data, tokenizer, num_samples=num_windows)
    for number in range(num_windows):
        sample = samples[number]
        tokens, labels = (np.asarray(sample[name], dtype=np.int32) for name in ("tokens", "labels"))
        yield Passage(np.append(tokens, labels[-1:]), length)


def cut_windows(tokens: npt.NDArray[np.int32], settings: WindowSettings) -> Iterator[Passage]:
    """Cut tokens [0, n) into windows that together predict tokens [1, n) once each.

    The first window predicts every token after its first. Each further window ends `stride` tokens later and
    predicts these; the last window predicts the remaining tokens.
    """
    predicted = min(settings.length, len(tokens) - 1)
    if predicted > 0:
        yield Passage(tokens[: predicted + 1], predicted)
    while predicted < len(tokens) - 1:
        end = min(predicted + settings.stride, len(tokens) - 1)
        yield Passage(tokens[end - settings.length : end + 1], end - predicted)
        predicted = end


def _split_into_portions(windows: Iterable[Passage]) -> Iterator[Sequence[Passage]]:
    portion: list[Passage] = []
    num_tokens = 0
    for window in windows:
        portion.append(window)
        num_tokens += len(window.tokens)
        if num_tokens >= TOKENS_PER_PORTION:
            yield portion
            portion, num_tokens = [], 0
    if portion:
        yield portion
