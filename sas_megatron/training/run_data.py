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
from sas_megatron.data.validation_sets import list_validation_sets
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
        self._validation_samples = {
            name: build_validation_samples(data, tokenizer, num_samples=config.evaluation.num_sequences)
            for name, data in list_validation_sets(config).items()
        }

    def training_batches(self, first_sample: int) -> Iterator[Batch]:
        """Return this rank's microbatches of the step that begins with `first_sample`."""
        num_samples = self._config.training.global_batch_size
        return self._batches(self._training_samples, first_sample=first_sample, num_samples=num_samples)

    def validation_batches(self) -> dict[str, Iterator[Batch]]:
        """Return this rank's microbatches of all samples of each validation set, by its name."""
        num_samples = self._config.evaluation.num_sequences
        return {
            name: self._batches(samples, first_sample=0, num_samples=num_samples)
            for name, samples in self._validation_samples.items()
        }

    def probe_batches(self) -> tuple[Iterator[Batch], int]:
        """Return the microbatches of the probe and their number, the same on every data rank.

        They are the first samples of the first validation set.
        """
        num_samples, size = self._config.evaluation.probe_sequences, self._config.training.micro_batch_size
        multiple = self._config.parallel.microbatch_group_size
        count = math.ceil(num_samples / size / multiple) * multiple
        batches = microbatches(
            next(iter(self._validation_samples.values())),
            first_sample=0,
            num_samples=num_samples,
            num_microbatches=count,
            micro_batch_size=size,
            data_rank=0,
            data_size=1,
            device=self._topology.device,
            context_group=self._topology.context_group,
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
        )
