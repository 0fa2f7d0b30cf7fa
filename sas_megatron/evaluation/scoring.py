"""Log-probabilities of tokens given those before them, of many texts at once.

passages -> rows (those that are read alike, once) -> longest first, filled into batches of a bounded size
  -> shared among the data ranks -> hidden states -> those that predict something that is scored
  -> logits of the vocabulary's parts, so many at a time -> log-probabilities, and which tokens are likeliest
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.evaluation.trained_model import TrainedModel

# Logits that a rank holds at a time: 64 MiB in float32.
LOGITS_AT_ONCE = 2**24
# A CPU adds up exponentials by several passes: over so many logits they stay within its cache, which takes
# half the time (measured for 8,192 and 32,000 tokens of vocabulary).
LOGITS_IN_CACHE = 2**20


@dataclass(frozen=True)
class Passage:
    """Tokens, int32, of which the last `num_scored` are scored; at least one comes before them."""

    tokens: npt.NDArray[np.int32]
    num_scored: int

    def __post_init__(self) -> None:
        assert 0 < self.num_scored < len(self.tokens), (
            f"{self.num_scored} scored of {len(self.tokens)} tokens"
        )


@dataclass(frozen=True)
class Scores:
    """Of each scored token of a passage, its log-probability, and whether no other is likelier."""

    log_probabilities: npt.NDArray[np.float64]
    are_likeliest: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """Tokens that the model reads, and the passages that it predicts the ends of, by their numbers."""

    tokens: npt.NDArray[np.int32]
    passages: list[int]


def score(
    model: TrainedModel, passages: Sequence[Passage], *, batch_tokens: int, vocabulary: int
) -> list[Scores]:
    """Scores of each passage, the same on every rank; every rank must call it alike.

    Args:
        model: What reads them.
        passages: In any order.
        batch_tokens: Of a batch, padding included; a longer passage is a batch of its own.
        vocabulary: Columns of the logits that share the probability; the others, which pad the table, get
            none of it.
    """
    place = model.topology
    batches = fill_batches(read_rows(passages), batch_tokens)
    found: dict[int, Scores] = {}
    for batch in batches[place.data_rank :: place.data_size]:
        hidden = model.hidden_states(_as_rectangle(batch))
        if hidden is not None:
            found.update(_score_batch(model, hidden, batch, passages, vocabulary))
    reports = model.is_last_stage and place.tensor_rank == 0
    merged = {
        number: scores
        for part in gather_from_ranks(found if reports else {})
        for number, scores in part.items()
    }
    return [merged[number] for number in range(len(passages))]


def read_rows(passages: Sequence[Passage]) -> list[Row]:
    """What is read for all passages: of those that differ only in their last token, the same once."""
    numbers: dict[bytes, list[int]] = defaultdict(list)
    for number, passage in enumerate(passages):
        numbers[passage.tokens[:-1].tobytes()].append(number)
    return [Row(passages[alike[0]].tokens[:-1], alike) for alike in numbers.values()]


def fill_batches(rows: Sequence[Row], batch_tokens: int) -> list[list[Row]]:
    """Longest first, so that a batch has little padding; as many rows each as `batch_tokens` allow."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _as_rectangle(batch: Sequence[Row]) -> torch.Tensor:
    """[B, S], padded at the end, where causal attention keeps the padding from being read."""
    padded = np.zeros((len(batch), len(batch[0].tokens)), dtype=np.int64)
    for index, row in enumerate(batch):
        padded[index, : len(row.tokens)] = row.tokens
    return torch.from_numpy(padded)


def _score_batch(
    model: TrainedModel,
    hidden_SBH: torch.Tensor,
    batch: Sequence[Row],
    passages: Sequence[Passage],
    vocabulary: int,
) -> dict[int, Scores]:
    """The scores of a batch's passages by number, on the last stage."""
    # Where the hidden states are that predict something: the last ones of each row.
    places: list[int] = []
    rows: list[int] = []
    # Scored tokens, the hidden state that predicts each, and which are a passage's.
    targets: list[int] = []
    sources: list[int] = []
    spans: dict[int, slice] = {}
    for index, row in enumerate(batch):
        longest = max(passages[number].num_scored for number in row.passages)
        end = len(rows) + longest
        for number in row.passages:
            scored = passages[number].num_scored
            spans[number] = slice(len(targets), len(targets) + scored)
            targets += passages[number].tokens[-scored:].tolist()
            sources += range(end - scored, end)
        places += range(len(row.tokens) - longest, len(row.tokens))
        rows += [index] * longest
    device = hidden_SBH.device
    predicting_KH = hidden_SBH[torch.tensor(places, device=device), torch.tensor(rows, device=device)]
    parts = _score_tokens(
        model, predicting_KH, torch.tensor(sources), torch.tensor(targets), vocabulary=vocabulary
    )
    log_probabilities, are_likeliest = (part.numpy() for part in parts)
    return {number: Scores(log_probabilities[span], are_likeliest[span]) for number, span in spans.items()}


@torch.no_grad()
def _score_tokens(
    model: TrainedModel,
    hidden_KH: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocabulary: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each target, its log-probability after the hidden state of `sources`, and if it is the likeliest."""
    part = VocabularyPart(model, vocabulary)
    log_probabilities = torch.empty(len(targets), dtype=torch.float64)
    are_likeliest = torch.empty(len(targets), dtype=torch.bool)
    for begin, end in _spans(len(hidden_KH), max(1, LOGITS_AT_ONCE // part.num_columns)):
        logits = part.logits(hidden_KH[begin:end])
        chosen = torch.nonzero((sources >= begin) & (sources < end)).squeeze(1)
        rows, tokens = sources[chosen].to(logits.device) - begin, targets[chosen].to(logits.device)
        of_targets = part.logits_of(logits, rows, tokens)
        log_probabilities[chosen] = (of_targets - part.log_sum(logits)[rows]).double().cpu()
        are_likeliest[chosen] = part.are_likeliest(logits, rows, tokens, of_targets).cpu()
    return log_probabilities, are_likeliest


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + step, length)) for begin in range(0, length, step))


class VocabularyPart:
    """This tensor rank's columns of the logits, and what all ranks' columns say together."""

    def __init__(self, model: TrainedModel, vocabulary: int) -> None:
        self._model, self._group = model, model.topology.tensor_group
        self.num_columns = model.config.model.padded_vocab_size // model.config.parallel.tensor
        self._first = model.topology.tensor_rank * self.num_columns
        self._used = min(max(vocabulary - self._first, 0), self.num_columns)

    def logits(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """[K, V/P], -∞ in columns that have no share."""
        logits = self._model.logits(hidden_KH)
        logits[:, self._used :] = -torch.inf
        return logits

    def log_sum(self, logits_KV: torch.Tensor) -> torch.Tensor:
        """log Σ exp over all columns, [K]."""
        at_once = LOGITS_IN_CACHE // self.num_columns if logits_KV.device.type == "cpu" else len(logits_KV)
        own = torch.cat([part.logsumexp(dim=-1) for part in logits_KV.split(max(1, at_once))])
        if self._group.size() == 1:
            return own
        parts = own.new_empty(self._group.size() * len(own))
        dist.all_gather_into_tensor(parts, own, group=self._group)
        return parts.view(-1, len(own)).logsumexp(dim=0)

    def logits_of(self, logits_KV: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The logit of each token in its row, whichever rank has it."""
        columns = tokens - self._first
        is_here = (columns >= 0) & (columns < self.num_columns)
        found = logits_KV[rows, columns.clamp(0, self.num_columns - 1)].where(is_here, 0.0)
        self._reduce(found, dist.ReduceOp.SUM)
        return found

    def are_likeliest(
        self, logits_KV: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, of_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Whether each token is the likeliest of its row, of equally likely ones the first."""
        largest = logits_KV.amax(dim=-1)
        self._reduce(largest, dist.ReduceOp.MAX)
        found = of_tokens == largest[rows]
        # Where they are, which is slower, is only asked of rows whose token may be the one.
        at_hand = rows[found]
        own, column = logits_KV[at_hand].max(dim=-1)
        beyond = self._model.config.model.padded_vocab_size
        first = (column + self._first).where(own == largest[at_hand], beyond)
        self._reduce(first, dist.ReduceOp.MIN)
        found[found.clone()] = first == tokens[found]
        return found

    def _reduce(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if self._group.size() > 1:
            dist.all_reduce(values, operation, group=self._group)
