"""Log-probabilities of tokens given the preceding tokens, for many texts.

passages -> rows (passages with the same input share one) -> longest first, batches of a bounded size
  -> distributed over the data ranks -> hidden states -> those that predict a scored token
  -> logits of the vocabulary shards, in portions -> log-probabilities, and whether tokens are the most likely
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

# Largest number of logits on a rank: 64 MiB in float32.
MAX_LOGITS = 2**24
# On CPU, logsumexp makes several passes. With this many logits they fit into the processor's cache, which
# halves the time (measured for vocabularies of 8,192 and 32,000 tokens).
MAX_LOGITS_IN_CPU_CACHE = 2**20


@dataclass(frozen=True)
class Passage:
    """Tokens, int32, of which the last `num_scored` are scored. At least one token precedes them."""

    tokens: npt.NDArray[np.int32]
    num_scored: int

    def __post_init__(self) -> None:
        assert 0 < self.num_scored < len(self.tokens), (
            f"{self.num_scored} scored of {len(self.tokens)} tokens"
        )


@dataclass(frozen=True)
class Scores:
    """The log-probability of each scored token of a passage, and whether it is the most likely token."""

    log_probabilities: npt.NDArray[np.float64]
    are_most_likely: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """Input tokens, and the indices of the passages whose scored tokens they predict."""

    tokens: npt.NDArray[np.int32]
    passages: list[int]


def score(
    model: TrainedModel, passages: Sequence[Passage], *, batch_tokens: int, vocabulary: int
) -> list[Scores]:
    """Score each passage. Every rank must call this function with the same arguments.

    Args:
        model: The model.
        passages: The passages, in any order.
        batch_tokens: Largest number of tokens in a batch, including padding. A longer passage gets its own
            batch.
        vocabulary: Number of columns of the logits in the softmax. The other columns, which pad the
            vocabulary, get probability 0.

    Returns:
        The scores of each passage, on every rank.
    """
    topology = model.topology
    batches = fill_batches(read_rows(passages), batch_tokens)
    local_scores: dict[int, Scores] = {}
    for batch in batches[topology.data_rank :: topology.data_size]:
        hidden = model.hidden_states(_pad_rows(batch))
        if hidden is not None:
            local_scores.update(_score_batch(model, hidden, batch, passages, vocabulary))
    reports = model.is_last_stage and topology.tensor_rank == 0
    merged = {
        number: scores
        for part in gather_from_ranks(local_scores if reports else {})
        for number, scores in part.items()
    }
    return [merged[number] for number in range(len(passages))]


def read_rows(passages: Sequence[Passage]) -> list[Row]:
    """Return the inputs of all passages. Passages that differ only in their last token share a row."""
    numbers: dict[bytes, list[int]] = defaultdict(list)
    for number, passage in enumerate(passages):
        numbers[passage.tokens[:-1].tobytes()].append(number)
    return [Row(passages[same[0]].tokens[:-1], same) for same in numbers.values()]


def fill_batches(rows: Sequence[Row], batch_tokens: int) -> list[list[Row]]:
    """Divide rows into batches of at most `batch_tokens`, longest first to reduce padding."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].tokens) <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _pad_rows(batch: Sequence[Row]) -> torch.Tensor:
    """Return the rows as [B, S], padded at the end, where causal attention does not read the padding."""
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
    """Return the scores of the passages of a batch by index. Last stage only."""
    # Positions and rows of the hidden states that predict scored tokens: the last ones of each row.
    positions: list[int] = []
    rows: list[int] = []
    # Scored tokens, the index of the hidden state that predicts each, and the range of each passage.
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
        positions += range(len(row.tokens) - longest, len(row.tokens))
        rows += [index] * longest
    device = hidden_SBH.device
    predicting_KH = hidden_SBH[torch.tensor(positions, device=device), torch.tensor(rows, device=device)]
    results = _score_tokens(
        model, predicting_KH, torch.tensor(sources), torch.tensor(targets), vocabulary=vocabulary
    )
    log_probabilities, are_most_likely = (result.numpy() for result in results)
    return {number: Scores(log_probabilities[span], are_most_likely[span]) for number, span in spans.items()}


@torch.no_grad()
def _score_tokens(
    model: TrainedModel,
    hidden_KH: torch.Tensor,
    sources: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocabulary: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each target its log-probability, and whether it is the most likely token.

    Args:
        model: The model.
        hidden_KH: Hidden states.
        sources: Index of the hidden state that predicts each target.
        targets: Tokens.
        vocabulary: Number of columns in the softmax.
    """
    shard = VocabularyShard(model, vocabulary)
    log_probabilities = torch.empty(len(targets), dtype=torch.float64)
    are_most_likely = torch.empty(len(targets), dtype=torch.bool)
    for begin, end in _spans(len(hidden_KH), max(1, MAX_LOGITS // shard.num_columns)):
        logits = shard.logits(hidden_KH[begin:end])
        selected = torch.nonzero((sources >= begin) & (sources < end)).squeeze(1)
        rows, tokens = sources[selected].to(logits.device) - begin, targets[selected].to(logits.device)
        of_targets = shard.logits_of(logits, rows, tokens)
        log_probabilities[selected] = (of_targets - shard.log_sum(logits)[rows]).double().cpu()
        are_most_likely[selected] = shard.are_most_likely(logits, rows, tokens, of_targets).cpu()
    return log_probabilities, are_most_likely


def _spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + step, length)) for begin in range(0, length, step))


class VocabularyShard:
    """The columns of the logits on this tensor rank, and reductions over the columns of all tensor ranks."""

    def __init__(self, model: TrainedModel, vocabulary: int) -> None:
        self._model, self._group = model, model.topology.tensor_group
        self.num_columns = model.config.model.padded_vocab_size // model.config.parallel.tensor
        self._first = model.topology.tensor_rank * self.num_columns
        self._used = min(max(vocabulary - self._first, 0), self.num_columns)

    def logits(self, hidden_KH: torch.Tensor) -> torch.Tensor:
        """Return the local logits, [K, V/P], with -∞ in columns outside of the softmax."""
        logits = self._model.logits(hidden_KH)
        logits[:, self._used :] = -torch.inf
        return logits

    def log_sum(self, logits_KV: torch.Tensor) -> torch.Tensor:
        """Return log Σ exp over the columns of all ranks, [K]."""
        is_cpu = logits_KV.device.type == "cpu"
        num_rows = MAX_LOGITS_IN_CPU_CACHE // self.num_columns if is_cpu else len(logits_KV)
        local = torch.cat([rows.logsumexp(dim=-1) for rows in logits_KV.split(max(1, num_rows))])
        if self._group.size() == 1:
            return local
        gathered = local.new_empty(self._group.size() * len(local))
        dist.all_gather_into_tensor(gathered, local, group=self._group)
        return gathered.view(-1, len(local)).logsumexp(dim=0)

    def logits_of(self, logits_KV: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logit of each token in its row, all-reduced over the ranks."""
        columns = tokens - self._first
        is_local = (columns >= 0) & (columns < self.num_columns)
        found = logits_KV[rows, columns.clamp(0, self.num_columns - 1)].where(is_local, 0.0)
        self._reduce(found, dist.ReduceOp.SUM)
        return found

    def are_most_likely(
        self, logits_KV: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, of_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Return whether each token is the first of the most likely tokens of its row.

        Args:
            logits_KV: Local logits.
            rows: Row of each token.
            tokens: The tokens.
            of_tokens: Their logits.
        """
        largest = logits_KV.amax(dim=-1)
        self._reduce(largest, dist.ReduceOp.MAX)
        found = of_tokens == largest[rows]
        # The index of the maximum, which is slower, is needed only for rows whose token has the largest
        # logit.
        candidate_rows = rows[found]
        local, column = logits_KV[candidate_rows].max(dim=-1)
        beyond = self._model.config.model.padded_vocab_size
        first = (column + self._first).where(local == largest[candidate_rows], beyond)
        self._reduce(first, dist.ReduceOp.MIN)
        found[found.clone()] = first == tokens[found]
        return found

    def _reduce(self, values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        if self._group.size() > 1:
            dist.all_reduce(values, operation, group=self._group)
