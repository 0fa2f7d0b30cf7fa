"""Held-out loss over whole documents, by windows that slide: each token once, with as much before it as fits.

    document -> end of document, its tokens, end of document -> windows, each `stride` tokens further
      -> those of a window's predictions that none before it made -> sums by position in the window

The padding rows of the output table take part, as in training and its own evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sas_megatron.config.run import RunConfig
from sas_megatron.data.batches import build_validation_samples
from sas_megatron.data.token_files import open_token_files
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.evaluation.held_out import HeldOutLoss
from sas_megatron.evaluation.scoring import Passage, Scores, score
from sas_megatron.evaluation.trained_model import TrainedModel
from sas_megatron.evaluation.window_settings import WindowSettings

# Tokens of windows that are scored together, before more of the text is read.
TOKENS_AT_ONCE = 2**20


@dataclass
class LossByPosition:
    """Sums of losses by how many tokens a prediction could read: 1, 2, 3–4, 5–8 and so on.

    `sums` are loss in nats, tokens and bytes, [buckets, 3]; bucket b is of those that read up to 2^b.
    """

    sums: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((64, 3)))

    def __add__(self, other: LossByPosition) -> LossByPosition:
        return LossByPosition(self.sums + other.sums)

    def add(self, window: Passage, scores: Scores, byte_lengths: npt.NDArray[np.int32]) -> None:
        """Takes the predictions of a window; `byte_lengths` are those of the tokens."""
        num_read = np.arange(len(window.tokens) - window.num_scored, len(window.tokens))
        num_bytes = byte_lengths[window.tokens[-window.num_scored :]]
        terms = np.stack([-scores.log_probabilities, np.ones(window.num_scored), num_bytes], axis=1)
        np.add.at(self.sums, np.ceil(np.log2(num_read)).astype(np.int64), terms)

    def total(self) -> HeldOutLoss:
        """Over all positions."""
        return _held_out(self.sums.sum(axis=0))

    def by_position(self) -> list[tuple[int, HeldOutLoss]]:
        """The most tokens that a bucket's predictions could read, and their loss; none without tokens."""
        return [(2**bucket, _held_out(sums)) for bucket, sums in enumerate(self.sums) if sums[1] > 0]


def _held_out(sums: npt.NDArray[np.float64]) -> HeldOutLoss:
    loss, num_tokens, num_bytes = sums.tolist()
    return HeldOutLoss(loss / num_tokens, int(num_tokens), int(num_bytes))


def measure_windows(model: TrainedModel, windows: Iterable[Passage], *, batch_tokens: int) -> LossByPosition:
    """The loss over windows, the same on every rank; all must call it, with the same windows."""
    found, byte_lengths = LossByPosition(), model.tokenizer.token_byte_lengths()
    for portion in _portions(windows):
        scores = score(
            model, portion, batch_tokens=batch_tokens, vocabulary=model.config.model.padded_vocab_size
        )
        for window, of_window in zip(portion, scores, strict=True):
            found.add(window, of_window, byte_lengths)
    return found


def document_windows(
    documents: Iterable[str], tokenizer: Tokenizer, settings: WindowSettings
) -> Iterator[Passage]:
    """Of whole documents, each for itself, as if another had ended before it."""
    eos = tokenizer.eos_id
    for document in documents:
        yield from cut_windows(np.array([eos, *tokenizer.encode(document), eos], dtype=np.int32), settings)


def validation_windows(config: RunConfig, tokenizer: Tokenizer, *, length: int) -> Iterator[Passage]:
    """The windows of the run's own evaluation; of another length, those of about as many tokens.

    Every rank must call it, in a joined world.

    Raises:
        UserError: the run's token files are not there, or documents are kept apart in its windows.
    """
    if config.data.reset_at_document_ends:
        raise config.data.problem(
            "reset_at_document_ends",
            "keeps documents apart, which is done for whole files here",
            "use --files",
        )
    open_token_files(config.data, vocab_size=config.model.vocab_size)
    num_windows = max(1, config.evaluation.num_sequences * config.data.sequence_length // length)
    data = config.data.model_copy(update={"sequence_length": length})
    samples = build_validation_samples(data, tokenizer, num_samples=num_windows)
    for number in range(num_windows):
        sample = samples[number]
        tokens, labels = (np.asarray(sample[name], dtype=np.int32) for name in ("tokens", "labels"))
        yield Passage(np.append(tokens, labels[-1:]), length)


def cut_windows(tokens: npt.NDArray[np.int32], settings: WindowSettings) -> Iterator[Passage]:
    """Windows of tokens [0, n) that predict [1, n), each token once.

    The first predicts as many as it reads; each further one reaches `stride` tokens beyond the one before
    and predicts those, the last what is left, after all that a window can read.
    """
    predicted = min(settings.length, len(tokens) - 1)
    if predicted > 0:
        yield Passage(tokens[: predicted + 1], predicted)
    while predicted < len(tokens) - 1:
        end = min(predicted + settings.stride, len(tokens) - 1)
        yield Passage(tokens[end - settings.length : end + 1], end - predicted)
        predicted = end


def _portions(windows: Iterable[Passage]) -> Iterator[Sequence[Passage]]:
    portion: list[Passage] = []
    num_tokens = 0
    for window in windows:
        portion.append(window)
        num_tokens += len(window.tokens)
        if num_tokens >= TOKENS_AT_ONCE:
            yield portion
            portion, num_tokens = [], 0
    if portion:
        yield portion
