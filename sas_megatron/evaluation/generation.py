"""Generate text: one pass over the prompts of a batch, then one token per text and pass, until all texts end.

prompts, longest first -> batches within a budget of cache slots, distributed over the data ranks
  -> cache, last hidden states -> (last stage) logits, one token per text -> (all stages) the next pass
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sas_megatron.attention.kv_cache import KeyValueCache
from sas_megatron.data.tokenizer import Tokenizer
from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.evaluation.settings import GenerationSettings, Sampling
from sas_megatron.evaluation.trained_model import TrainedModel

# "length": the text has `max_new_tokens`; "full context": it fills the context of the model.
Finish = Literal["end of document", "stop string", "length", "full context"]


@dataclass(frozen=True)
class Completion:
    """The generated tokens, including an end of document, their text, and why the text ended."""

    tokens: list[int]
    text: str
    finish: Finish


@dataclass(frozen=True)
class Generated:
    """Completions in the order of the prompts, and the largest cache size per token and rank, in bytes."""

    completions: list[Completion]
    cache_bytes_per_token: int


def generate(
    model: TrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    numbers: Sequence[int] | None = None,
) -> Generated:
    """Continue each prompt. Every rank must call this function with the same arguments.

    The tokens sampled for a text depend on the seed and the number of the text, not on its batch or the
    layout.

    Args:
        model: The model.
        prompts: Tokens of the prompts. A prompt must not be empty or fill the context.
        settings: Sampling, limits and stop strings.
        numbers: A different number for each text; None numbers them in order.
    """
    context = model.config.data.sequence_length
    numbers = range(len(prompts)) if numbers is None else numbers
    drafts = [
        _Draft(number, list(prompt), settings, min(settings.max_new_tokens, context - len(prompt)))
        for number, prompt in zip(numbers, prompts, strict=True)
    ]
    batches = _fill_batches(drafts, settings.batch_tokens)
    topology = model.topology
    completed: dict[int, Completion] = {}
    cache_bytes = 0
    for batch in batches[topology.data_rank :: topology.data_size]:
        cache_bytes = max(cache_bytes, _complete_batch(model, batch, settings.sampling))
        completed.update({draft.number: draft.completion() for draft in batch})
    by_rank = gather_from_ranks((completed, cache_bytes))
    merged = {number: completion for of_rank, _ in by_rank for number, completion in of_rank.items()}
    return Generated([merged[number] for number in numbers], max(num_bytes for _, num_bytes in by_rank))


def build_generator(seed: int, number: int) -> torch.Generator:
    """Return the random generator of a text, which depends only on the seed and the number of the text."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def choose_tokens(
    logits_BV: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """Return the next token of each text, int64 [B]. Sampling draws one number from each generator."""
    if sampling.temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    scaled = logits_BV.double() / sampling.temperature
    probabilities, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        probabilities[:, sampling.top_k :] = 0.0
    if sampling.top_p is not None:
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities[before >= sampling.top_p] = 0.0
    cumulative = probabilities.cumsum(dim=-1)
    draws = [torch.rand((), dtype=torch.float64, generator=generator) for generator in generators]
    drawn = torch.stack(draws).to(cumulative.device)[:, None] * cumulative[:, -1:]
    # The first index whose cumulative probability exceeds the draw. Rounding may make the draw equal to the
    # total.
    index = torch.searchsorted(cumulative, drawn, right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, index.minimum(last)).squeeze(1)


class _Draft:
    """A text that is being generated."""

    def __init__(self, number: int, prompt: list[int], settings: GenerationSettings, limit: int) -> None:
        self.number, self.prompt, self.limit = number, prompt, limit
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.generator = build_generator(settings.sampling.seed, number)
        self._max_new_tokens = settings.max_new_tokens
        self._stop = [text.encode() for text in settings.stop]
        self._text = b""

    @property
    def num_slots(self) -> int:
        """Largest number of tokens of this text in the cache."""
        return len(self.prompt) + self.limit

    def append(self, token: int, tokenizer: Tokenizer) -> None:
        """Append a token, and set `finish` if the text ends with it."""
        self.tokens.append(token)
        # A stop string may begin in an earlier token and end in this one.
        begin = max(0, len(self._text) - max(map(len, self._stop), default=0))
        self._text += tokenizer.decode_bytes([token])
        ends = [index for stop in self._stop if (index := self._text.find(stop, begin)) >= 0]
        if ends:
            self._text, self.finish = self._text[: min(ends)], "stop string"
        elif token == tokenizer.eos_id:
            self.finish = "end of document"
        elif len(self.tokens) == self.limit:
            self.finish = "length" if self.limit == self._max_new_tokens else "full context"

    def completion(self) -> Completion:
        """Return the finished text."""
        assert self.finish is not None, "a batch is complete only after all its texts have ended"
        return Completion(self.tokens, self._text.decode("utf-8", errors="replace"), self.finish)


def _fill_batches(drafts: Sequence[_Draft], batch_tokens: int) -> list[list[_Draft]]:
    """Divide texts, longest first, into batches whose size times longest text is at most `batch_tokens`."""
    batches: list[list[_Draft]] = []
    for draft in sorted(drafts, key=lambda draft: -draft.num_slots):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].num_slots <= batch_tokens:
            batches[-1].append(draft)
        else:
            batches.append([draft])
    return batches


def _complete_batch(model: TrainedModel, batch: list[_Draft], sampling: Sampling) -> int:
    """Generate the texts of a batch; return the size of the cache per token, in bytes."""
    cache = model.new_cache(len(batch), max_tokens=max(draft.num_slots for draft in batch))
    new = [draft.prompt for draft in batch]
    while batch:
        tokens = _next_tokens(model, cache, new, batch, sampling)
        for draft, token in zip(batch, tokens, strict=True):
            draft.append(token, model.tokenizer)
        unfinished = [index for index, draft in enumerate(batch) if draft.finish is None]
        if len(unfinished) < len(batch):
            cache.keep(unfinished)
            batch = [batch[index] for index in unfinished]
        new = [draft.tokens[-1:] for draft in batch]
    return cache.bytes_per_token


def _next_tokens(
    model: TrainedModel,
    cache: KeyValueCache,
    new: list[list[int]],
    batch: list[_Draft],
    sampling: Sampling,
) -> list[int]:
    """Run a pass over the new tokens of each text; return the next token of each text, on all ranks."""
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
        logits = model.full_logits(hidden[last, torch.arange(len(new), device=device)])
        chosen = choose_tokens(logits, sampling, [draft.generator for draft in batch])
    next_tokens: list[int] = model.broadcast_from_last_stage(chosen).tolist()
    return next_tokens
