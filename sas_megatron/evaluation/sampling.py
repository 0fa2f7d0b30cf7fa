"""Which token comes next: the likeliest, or one that is drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from sas_megatron.evaluation.generation_settings import Sampling


def build_generator(seed: int, number: int) -> torch.Generator:
    """What draws for a text, by the seed and the text's number alone: not by its batch or its rank."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def choose_tokens(
    logits_BV: torch.Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> torch.Tensor:
    """The next token of each text, int64 [B]; each generator draws once."""
    if sampling.temperature == 0.0:
        return logits_BV.argmax(dim=-1)
    scaled = logits_BV.double() / sampling.temperature
    shares, tokens = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        shares[:, sampling.top_k :] = 0.0
    if sampling.top_p is not None:
        shares /= shares.sum(dim=-1, keepdim=True)
        before = shares.cumsum(dim=-1) - shares
        shares[before >= sampling.top_p] = 0.0
    reached = shares.cumsum(dim=-1)
    draws = [torch.rand((), dtype=torch.float64, generator=generator) for generator in generators]
    drawn = torch.stack(draws).to(reached.device)[:, None] * reached[:, -1:]
    # The first place whose sum exceeds the draw, which may be rounded up to the sum of all.
    place = torch.searchsorted(reached, drawn, right=True)
    last = (shares > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, place.minimum(last)).squeeze(1)
