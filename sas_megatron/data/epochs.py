"""How many times a run reads the tokens of its training and validation parts.

A loss on repeated tokens is not one of new tokens. Up to about four epochs the difference is small
(Muennighoff et al. 2023, arXiv 2305.16264), but a law L(N, D) assumes that all D tokens are new.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sas_megatron.config.data import DataConfig
from sas_megatron.config.errors import FieldError
from sas_megatron.config.run import RunConfig
from sas_megatron.data.document_split import DocumentPart, split_documents
from sas_megatron.data.token_files import read_document_lengths, token_file
from sas_megatron.data.validation_sets import list_validation_sets

# Megatron-core lists the documents and samples of all epochs in memory, at about 16 bytes each, and counts
# the epochs one by one. Data that are read fewer times than this may have longer lists.
MANY_EPOCHS = 1000
MAX_REPEATED_ENTRIES = 2**26


@dataclass(frozen=True)
class PartUse:
    """A part of a prefix, and how many times a run reads it."""

    num_documents: int
    num_tokens: int
    epochs: float


@dataclass(frozen=True)
class DataUse:
    """The training and validation parts that a run reads, by prefix, and the number of its steps.

    Prefixes that name the same files, of which `repeated_prefixes` are the later ones, are one part.
    """

    training: Mapping[str, PartUse]
    validation: Mapping[str, PartUse]
    repeated_prefixes: tuple[str, ...]
    num_steps: int
    num_windows: int
    num_distinct_windows: int

    @property
    def epochs(self) -> float:
        """How many times the run reads the training part that it repeats most often."""
        return max(part.epochs for part in self.training.values())

    @property
    def validation_epochs(self) -> float:
        """How many times the validation windows contain the part that they repeat most often."""
        return max(part.epochs for part in self.validation.values())

    def epochs_at(self, step: int) -> float:
        """Return `epochs` after a step."""
        return self.epochs * step / self.num_steps

    def record(self) -> dict[str, Any]:
        """Return the parts as run.json stores them."""
        return {
            name: {prefix: vars(part) for prefix, part in parts.items()}
            for name, parts in (("training", self.training), ("validation", self.validation))
        }

    def describe(self) -> list[str]:
        """Return a line on the training data and one on the validation data; each states a repetition."""
        training = f"training data: {_describe_part(self.training, self.epochs, 'the run reads')}"
        if self.epochs > 1:
            training += "; more than one epoch: its losses are not those of new text"
        if self.repeated_prefixes:
            training += f"; data.prefixes names {', '.join(self.repeated_prefixes)} more than once"
        windows = f"{self.num_windows:,} windows contain"
        validation = f"validation data: {_describe_part(self.validation, self.validation_epochs, windows)}"
        repetition = self.describe_repeated_windows()
        return [training, validation if repetition is None else f"{validation}; {repetition}"]

    def describe_repeated_windows(self) -> str | None:
        """Return a remark if validation windows repeat text; otherwise None."""
        if self.validation_epochs <= 1:
            return None
        return (
            f"the validation text fills {self.num_distinct_windows:,} windows, and {self.num_windows:,} are "
            "evaluated, so that windows repeat it"
        )


def format_epochs(epochs: float) -> str:
    """Return a number of epochs with three digits."""
    return f"{epochs:.3g}" if epochs < 1000 else f"{epochs:,.0f}"


def describe_repetition(epochs: Mapping[str, float | None]) -> list[str]:
    """Return a remark if runs, given by name, read their training data more than once; otherwise nothing.

    Args:
        epochs: How many times each run reads its training data; None if it is unknown.
    """
    repeating = {name: count for name, count in epochs.items() if count is not None and count > 1}
    if not repeating:
        return []
    most = max(repeating, key=repeating.__getitem__)
    return [
        f"{len(repeating)} of {len(epochs)} runs read their training data more than once, at most "
        f"{format_epochs(repeating[most])} times ({most}): their losses are not those of new text, and a law "
        "fitted to them is not a law of D."
    ]


def describe_repeated_points(epochs: Sequence[float]) -> list[str]:
    """Return a remark if points of a law are from repeated data; otherwise nothing."""
    repeating = [count for count in epochs if count > 1]
    if not repeating:
        return []
    return [
        f"{len(repeating)} of {len(epochs)} runs read their training data more than once, at most "
        f"{format_epochs(max(repeating))} times: D counts repeated tokens, so that this is not a law of new "
        "tokens (Muennighoff et al. 2023)."
    ]


def _describe_part(parts: Mapping[str, PartUse], epochs: float, reader: str) -> str:
    num_tokens = sum(part.num_tokens for part in parts.values())
    num_documents = sum(part.num_documents for part in parts.values())
    often = max(parts, key=lambda prefix: parts[prefix].epochs)
    is_even = min(part.epochs for part in parts.values()) > 0.99 * epochs
    what = "them" if is_even else often
    return (
        f"{num_tokens:,} tokens in {num_documents:,} documents, and {reader} {what} "
        f"{format_epochs(epochs)} times"
    )


def count_data_use(config: RunConfig) -> DataUse:
    """Count the tokens of the parts that a run reads, and its epochs.

    Raises:
        FileProblem: The token files cannot be read.
    """
    use = PartCounts(config.data).data_use(config)
    if config.evaluation.sets is None:
        return use
    sets = {name: PartCounts(data).data_use(config) for name, data in list_validation_sets(config).items()}
    parts = [
        (name, prefix, part) for name, found in sets.items() for prefix, part in found.validation.items()
    ]
    return replace(
        use,
        validation={f"{name}: {prefix}": part for name, prefix, part in parts},
        num_windows=sum(found.num_windows for found in sets.values()),
        num_distinct_windows=sum(found.num_distinct_windows for found in sets.values()),
    )


def check_repetition(config: RunConfig) -> None:
    """Check that the run does not repeat its data so often that Megatron-core cannot list the repetitions.

    Raises:
        FieldError: It repeats a part of a prefix too often.
        FileProblem: The token files cannot be read.
    """
    use, training = count_data_use(config), config.training
    for field, value, parts, factor in (
        ("evaluation.num_sequences", config.evaluation.num_sequences, use.validation, 1.0),
        ("training.num_steps", training.num_steps, use.training, 1.0),
        (
            "training.order_steps",
            training.order_steps,
            use.training,
            (training.order_steps or training.num_steps) / training.num_steps,
        ),
    ):
        for prefix, part in parts.items():
            epochs = part.epochs * factor
            counted = DocumentPart(part.num_documents, part.num_tokens)
            entries = epochs * max(part.num_documents, count_samples(counted, config.data.sequence_length))
            if epochs > MANY_EPOCHS and entries > MAX_REPEATED_ENTRIES:
                raise FieldError(
                    field,
                    value,
                    f"reads {prefix} {format_epochs(epochs)} times, too often for Megatron-core to list",
                    "use a smaller number, or more data",
                )


class PartCounts:
    """The training and validation parts of the prefixes of a `data` section; reads their index files once.

    Raises:
        FileProblem: The token files cannot be read.
    """

    def __init__(self, data: DataConfig) -> None:
        # The first prefix that names the same files as each prefix.
        first: dict[str, str] = {}
        self._names = [
            first.setdefault(os.path.realpath(token_file(prefix, ".bin")), prefix) for prefix in data.prefixes
        ]
        parts = {
            prefix: split_documents(read_document_lengths(prefix), data.split) for prefix in first.values()
        }
        self._training = {prefix: training for prefix, (training, _) in parts.items()}
        self._validation = {prefix: validation for prefix, (_, validation) in parts.items()}

    def data_use(self, config: RunConfig) -> DataUse:
        """Return how a run with these prefixes reads them."""
        training, num_windows = config.training, config.evaluation.num_sequences
        num_samples = training.num_steps * training.global_batch_size
        length = config.data.sequence_length
        return DataUse(
            training=_count_epochs(self._training, self._names, config.data, num_samples=num_samples),
            validation=_count_epochs(self._validation, self._names, config.data, num_samples=num_windows),
            repeated_prefixes=tuple(
                prefix for index, prefix in enumerate(self._names) if prefix in self._names[:index]
            ),
            num_steps=training.num_steps,
            num_windows=num_windows,
            num_distinct_windows=sum(count_samples(part, length) for part in self._validation.values()),
        )


def count_samples(part: DocumentPart, sequence_length: int) -> int:
    """Return the samples of a part in one epoch. A sample takes S + 1 tokens and shares one with the next."""
    return (part.num_tokens - 1) // sequence_length


def balance_samples(
    data: DataConfig, parts: Sequence[DocumentPart], *, num_samples: int
) -> list[float] | None:
    """Return the weights of the prefixes for `num_samples` samples; None for one epoch in proportion to size.

    Without `data.weights`, Megatron-core's builder ends after one epoch of several prefixes.
    """
    if data.weights is not None or len(data.prefixes) == 1:
        return data.weights
    samples = [count_samples(part, data.sequence_length) for part in parts]
    return [float(count) for count in samples] if num_samples > sum(samples) else None


def _count_epochs(
    parts: Mapping[str, DocumentPart], names: Sequence[str], data: DataConfig, *, num_samples: int
) -> dict[str, PartUse]:
    """Return the share of the samples of each part, in epochs of its S-token predictions.

    Args:
        parts: The parts by name.
        names: The name of the part of each prefix.
        data: The `data` section.
        num_samples: The samples of all parts.
    """
    weights = data.weights or [count_samples(parts[name], data.sequence_length) for name in names]
    shares = dict.fromkeys(parts, 0.0)
    for name, weight in zip(names, weights, strict=True):
        shares[name] += weight / sum(weights)
    return {
        name: PartUse(
            part.num_documents,
            part.num_tokens,
            epochs=num_samples * data.sequence_length * shares[name] / (part.num_tokens - 1),
        )
        for name, part in parts.items()
    }
