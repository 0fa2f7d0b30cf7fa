"""The documents of each prefix that training and validation read.

Megatron-core assigns the first documents of a prefix to training and the last ones to validation. It searches
for the tokens of an empty part forever, so the parts are counted and checked here, before it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError


@dataclass(frozen=True)
class DocumentPart:
    """The documents of a prefix for training or for validation, and their tokens."""

    num_documents: int
    num_tokens: int


def format_split(split: Sequence[float]) -> str:
    """Return `data.split` as Megatron-core reads it, with an empty third part."""
    total = sum(split)
    return ",".join(f"{share / total:.9f}" for share in (*split, 0.0))


def count_training_documents(num_documents: int, split: Sequence[float]) -> int:
    """Return how many of the documents of a prefix are for training, as Megatron-core rounds it."""
    training, validation, _ = map(float, format_split(split).split(","))
    return round(training / (training + validation) * num_documents)


def split_documents(
    document_tokens: npt.NDArray[np.int32], split: Sequence[float]
) -> tuple[DocumentPart, DocumentPart]:
    """Return the training and the validation part of a prefix.

    Args:
        document_tokens: int32 [documents], number of tokens of each document.
        split: `data.split`.
    """
    cut = count_training_documents(len(document_tokens), split)
    training, validation = (
        DocumentPart(len(part), int(part.sum(dtype=np.int64)))
        for part in (document_tokens[:cut], document_tokens[cut:])
    )
    return training, validation


def check_split(data: DataConfig, document_tokens: Mapping[str, npt.NDArray[np.int32]]) -> None:
    """Check that both parts of every prefix have the tokens of at least one sample.

    A split without training documents is that of a validation set, whose one part is the entire prefix.

    A sample takes S + 1 tokens: it reads the first S and predicts the last S. A validation window longer than
    the part would contain the same text twice.

    Args:
        data: The `data` section.
        document_tokens: For each prefix int32 [documents], number of tokens of each document.

    Raises:
        FieldError: A part has no documents, or too few tokens. The remedy names a split that is valid for
            all prefixes, if there is one.
    """
    if data.split[0] == 0:
        return
    cuts = {prefix: _valid_cuts(tokens, data.sequence_length) for prefix, tokens in document_tokens.items()}
    for prefix, tokens in document_tokens.items():
        if count_training_documents(len(tokens), data.split) in cuts[prefix]:
            continue
        parts = dict(zip(("training", "validation"), split_documents(tokens, data.split), strict=True))
        part = min(parts, key=lambda name: parts[name].num_tokens)
        counts = parts[part]
        has = f"{len(tokens)} document{'s' if len(tokens) > 1 else ''}"
        split = _find_split(data.split, [(len(document_tokens[name]), cuts[name]) for name in cuts])
        if counts.num_documents == 0:
            raise FieldError(
                "data.split",
                data.split,
                f"leaves no {part} documents of {prefix}, which has {has}",
                f"use {split}"
                if split
                else f"prepare {prefix} from more documents: training and validation need more than "
                f"data.sequence_length={data.sequence_length} tokens each",
                (f"data.split={split}",) if split else (),
            )
        raise FieldError(
            "data.sequence_length",
            data.sequence_length,
            f"must be less than the {counts.num_tokens} {part} tokens of {prefix} ({counts.num_documents} of "
            f"{has})",
            f"use at most {counts.num_tokens - 1}, or "
            + (f"data.split={split}" if split else "prepare more documents"),
            (f"data.split={split}" if split else f"data.sequence_length={counts.num_tokens - 1}",),
        )


def _valid_cuts(document_tokens: npt.NDArray[np.int32], sequence_length: int) -> range:
    """Return the numbers of training documents with which both parts have more than S tokens."""
    # Every document has at least its end token, so that S + 1 documents suffice.
    first = document_tokens[: sequence_length + 1]
    last = document_tokens[-sequence_length - 1 :][::-1]
    return range(
        _count_required(first, sequence_length),
        len(document_tokens) - _count_required(last, sequence_length) + 1,
    )


def _count_required(document_tokens: npt.NDArray[np.int32], num_tokens: int) -> int:
    """Return how many of the first documents have more than `num_tokens` tokens in total."""
    totals = np.cumsum(document_tokens, dtype=np.int64)
    return int(np.searchsorted(totals, num_tokens, side="right")) + 1


def _find_split(split: Sequence[float], cuts: Sequence[tuple[int, range]]) -> list[float] | None:
    """Return the split nearest to `split`, with few decimals, that cuts all prefixes validly; None if none.

    Args:
        split: `data.split`.
        cuts: The number of documents of each prefix, and the valid numbers of training documents.
    """
    for training in _list_shares(split, cuts):
        candidate = [training, round(1 - training, 6)]
        if 0 < training < 1 and all(
            count_training_documents(count, candidate) in valid for count, valid in cuts
        ):
            return candidate
    return None


def _list_shares(split: Sequence[float], cuts: Sequence[tuple[int, range]]) -> Iterator[float]:
    """Yield shares of training documents near the valid range of all prefixes, rounded to 2 to 6 decimals."""
    lowest = max((valid.start - 0.5) / count for count, valid in cuts)
    highest = min((valid.stop - 0.5) / count for count, valid in cuts)
    nearest = min(max(split[0] / sum(split), lowest), highest)
    for decimals in range(2, 7):
        unit = 10.0**-decimals
        for share in sorted(
            (nearest - unit, nearest, nearest + unit), key=lambda share: abs(share - nearest)
        ):
            yield round(share, decimals)
