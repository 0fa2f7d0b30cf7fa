"""Generation: prompts -> a pass over all of a batch -> a token at a time, until each text has ended.

prompts, longest first -> batches that fit a budget of kept tokens, shared among the data ranks
  -> cache, last hidden states -> (last stage) logits, a token for each -> (all stages) the next pass
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sas_megatron.attention.kv_cache import KeyValueCache
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.evaluation.generation_settings import GenerationSettings, Sampling
from sas_megatron.evaluation.sampling import build_generator, choose_tokens
from sas_megatron.evaluation.trained_model import TrainedModel

# "length" is that of `max_new_tokens`.
Finish = Literal["end of document", "stop string", "length", "full context"]


@dataclass(frozen=True)
class Completion:
    """What a model made of a prompt: the tokens, the end of document included, and the text for them."""

    tokens: list[int]
    text: str
    finish: Finish


@dataclass(frozen=True)
class Generated:
    """Completions in the order of their prompts, and the bytes that each rank has kept of a token at most."""

    completions: list[Completion]
    cache_bytes_per_token: int


def generate(
    model: TrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    numbers: Sequence[int] | None = None,
) -> Generated:
    """Continues each prompt, none of which is empty or fills the context; every rank must call it alike.

    What is drawn for a text depends on the seed and its number, not on its batch or the layout.

    Args:
        model: What continues them.
        prompts: Tokens.
        settings: How.
        numbers: Of the texts, each another; None: in their order.
    """
    context = model.config.data.sequence_length
    numbers = range(len(prompts)) if numbers is None else numbers
    drafts = [
        _Draft(number, list(prompt), settings, min(settings.max_new_tokens, context - len(prompt)))
        for number, prompt in zip(numbers, prompts, strict=True)
    ]
    batches = _fill_batches(drafts, settings.batch_tokens)
    place = model.topology
    found: dict[int, Completion] = {}
    kept_bytes = 0
    for batch in batches[place.data_rank :: place.data_size]:
        kept_bytes = max(kept_bytes, _complete_batch(model, batch, settings.sampling))
        found.update({draft.number: draft.completion() for draft in batch})
    by_rank = gather_from_ranks((found, kept_bytes))
    merged = {number: done for part, _ in by_rank for number, done in part.items()}
    return Generated([merged[number] for number in numbers], max(kept for _, kept in by_rank))


class _Draft:
    """A text that is being generated."""

    def __init__(self, number: int, prompt: list[int], settings: GenerationSettings, limit: int) -> None:
        self.number, self.prompt, self.limit = number, prompt, limit
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.generator = build_generator(settings.sampling.seed, number)
        self._asked_for = settings.max_new_tokens
        self._stop = [text.encode() for text in settings.stop]
        self._text = b""

    @property
    def slots(self) -> int:
        """Tokens that the cache may have to hold."""
        return len(self.prompt) + self.limit

    def take(self, token: int, tokenizer: Tokenizer) -> None:
        """Appends a token, and finds out whether the text has ended."""
        self.tokens.append(token)
        # A stop string may begin in the text before and end within this token.
        begin = max(0, len(self._text) - max(map(len, self._stop), default=0))
        self._text += tokenizer.decode_bytes([token])
        ends = [place for stop in self._stop if (place := self._text.find(stop, begin)) >= 0]
        if ends:
            self._text, self.finish = self._text[: min(ends)], "stop string"
        elif token == tokenizer.eos_id:
            self.finish = "end of document"
        elif len(self.tokens) == self.limit:
            self.finish = "length" if self.limit == self._asked_for else "full context"

    def completion(self) -> Completion:
        """The finished text."""
        assert self.finish is not None, "a batch is complete when all its texts have ended"
        return Completion(self.tokens, self._text.decode("utf-8", errors="replace"), self.finish)


def _fill_batches(drafts: Sequence[_Draft], batch_tokens: int) -> list[list[_Draft]]:
    """Longest first; each batch as many texts as the budget holds, each at the longest's length."""
    batches: list[list[_Draft]] = []
    for draft in sorted(drafts, key=lambda draft: -draft.slots):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].slots <= batch_tokens:
            batches[-1].append(draft)
        else:
            batches.append([draft])
    return batches


def _complete_batch(model: TrainedModel, batch: list[_Draft], sampling: Sampling) -> int:
    """Runs the texts of a batch to their ends; the bytes that the cache keeps of a token."""
    cache = model.new_cache(len(batch), max_tokens=max(draft.slots for draft in batch))
    new = [draft.prompt for draft in batch]
    while batch:
        tokens = _next_tokens(model, cache, new, batch, sampling)
        for draft, token in zip(batch, tokens, strict=True):
            draft.take(token, model.tokenizer)
        going_on = [place for place, draft in enumerate(batch) if draft.finish is None]
        if len(going_on) < len(batch):
            cache.keep(going_on)
            batch = [batch[place] for place in going_on]
        new = [draft.tokens[-1:] for draft in batch]
    return cache.bytes_per_token


def _next_tokens(
    model: TrainedModel,
    cache: KeyValueCache,
    new: list[list[int]],
    batch: list[_Draft],
    sampling: Sampling,
) -> list[int]:
    """A pass over the new tokens of each text, and the token that follows; the same on all its ranks."""
    lengths = [len(tokens) for tokens in new]
    padded = torch.zeros(len(new), max(lengths), dtype=torch.int64)
    for row, tokens in enumerate(new):
        padded[row, : len(tokens)] = torch.tensor(tokens)
    cache.begin_pass(max(lengths))
    hidden = model.hidden_states(padded, cache)
    cache.end_pass(lengths)
    device = model.topology.device
    if hidden is None:
        chosen = torch.zeros(len(new), dtype=torch.int64, device=device)
    else:
        last = torch.tensor(lengths, device=device) - 1
        logits = model.whole_logits(hidden[last, torch.arange(len(new), device=device)])
        chosen = choose_tokens(logits, sampling, [draft.generator for draft in batch])
    drawn: list[int] = model.from_last_stage(chosen).tolist()
    return drawn
