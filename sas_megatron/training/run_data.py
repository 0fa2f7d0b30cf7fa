"""The samples of a run, and the microbatches of this rank.

token files -> ordered samples -> the samples of a step -> this data rank's microbatches
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sas_megatron.config.run import RunConfig
from sas_megatron.data.batches import (
    ByteLengths,
    build_training_samples,
    build_validation_samples,
    microbatches,
)
from sas_megatron.data.token_files import open_token_files
from sas_megatron.distributed.topology import Topology
from sas_megatron.model.language_loss import Batch


class RunData:
    """Training and validation samples. Their order depends on the seed, not on the layout of the ranks."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self._config = config
        self._topology = topology
        tokenizer = open_token_files(config.data, vocab_size=config.model.vocab_size)
        self.byte_lengths = ByteLengths(tokenizer, topology.device)
        self._training_samples = build_training_samples(
            config.data,
            tokenizer,
            num_samples=config.training.num_ordered_samples,
            seed=config.training.seed,
        )
        self._validation_samples = build_validation_samples(
            config.data, tokenizer, num_samples=config.evaluation.num_sequences
        )

    def training_batches(self, first_sample: int) -> Iterator[Batch]:
        """Return this rank's microbatches of the step that begins with `first_sample`."""
        num_samples = self._config.training.global_batch_size
        return self._batches(self._training_samples, first_sample=first_sample, num_samples=num_samples)

    def validation_batches(self) -> Iterator[Batch]:
        """Return this rank's microbatches of all validation samples."""
        num_samples = self._config.evaluation.num_sequences
        return self._batches(self._validation_samples, first_sample=0, num_samples=num_samples)

    def probe_batches(self) -> tuple[Iterator[Batch], int]:
        """Return the microbatches of the probe and their number, the same on every data rank."""
        num_samples, size = self._config.evaluation.probe_sequences, self._config.training.micro_batch_size
        multiple = self._config.parallel.microbatch_group_size
        count = math.ceil(num_samples / size / multiple) * multiple
        batches = microbatches(
            self._validation_samples,
            first_sample=0,
            num_samples=num_samples,
            num_microbatches=count,
            micro_batch_size=size,
            data_rank=0,
            data_size=1,
            device=self._topology.device,
            context_group=self._topology.context_group,
            with_segments=self._config.data.reset_at_document_ends,
        )
        return batches, count

    def num_microbatches(self, num_samples: int) -> int:
        """Return the number of microbatches in which each data rank processes its share of `num_samples`."""
        samples_per_round = self._config.training.micro_batch_size * self._topology.data_size
        multiple = self._config.parallel.microbatch_group_size
        return math.ceil(num_samples / samples_per_round / multiple) * multiple

    def _batches(self, samples: Any, *, first_sample: int, num_samples: int) -> Iterator[Batch]:
        return microbatches(
            samples,
            first_sample=first_sample,
            num_samples=num_samples,
            num_microbatches=self.num_microbatches(num_samples),
            micro_batch_size=self._config.training.micro_batch_size,
            data_rank=self._topology.data_rank,
            data_size=self._topology.data_size,
            device=self._topology.device,
            context_group=self._topology.context_group,
            with_segments=self._config.data.reset_at_document_ends,
        )
