"""The samples of a run, and the microbatches of this rank.

token files -> ordered samples -> the samples of a step -> this data rank's microbatches

A thread reads ahead of the step. Ranks of a pipeline stage that uses neither tokens nor labels read nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from sas_megatron.data.batches import (
    ByteLengths,
    build_training_samples,
    build_validation_samples,
    microbatches,
)
from sas_megatron.data.read_ahead import ReadAhead, on_device, pinned
from sas_megatron.data.token_files import open_token_files
from sas_megatron.data.validation_sets import list_validation_sets
from sas_megatron.distributed.topology import Topology
from sas_megatron.model.language_loss import Batch

# The microbatch of a rank that reads nothing.
_NO_SAMPLES: Batch = {}


class RunData:
    """Training and validation samples. Their order depends on the seed, not on the layout of the ranks."""

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self._config = config
        self._topology = topology
        # The first stage embeds the tokens, and the last one needs the labels. All stages need a mask.
        last_stage = config.parallel.pipeline - 1
        self._reads_samples = config.data.reset_at_document_ends or topology.pipeline_rank in (0, last_stage)
        # The microbatches from sample `_next_sample` on, which a thread reads.
        self._training_batches: ReadAhead[Batch] | None = None
        self._next_sample = 0
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
        """Return this rank's microbatches of the step that begins with `first_sample`.

        On a rank that needs no samples, the microbatches are empty.
        """
        num_samples = self._config.training.global_batch_size
        num_microbatches = self.num_microbatches(num_samples)
        if not self._reads_samples:
            return itertools.repeat(_NO_SAMPLES, num_microbatches)
        if self._training_batches is None or first_sample != self._next_sample:
            if self._training_batches is not None:
                self._training_batches.close()
            steps = range(first_sample, self._config.training.num_ordered_samples, num_samples)
            read = self._reader(self._training_samples, num_samples=num_samples)
            self._training_batches = ReadAhead(
                pinned(itertools.chain.from_iterable(map(read, steps)), self._topology.device)
            )
        self._next_sample = first_sample + num_samples
        batches = itertools.islice(self._training_batches, num_microbatches)
        return on_device(batches, self._topology.device)

    def validation_batches(self) -> dict[str, Iterator[Batch]]:
        """Return this rank's microbatches of all samples of each validation set, by its name.

        They are empty as in `training_batches`.
        """
        num_samples, device = self._config.evaluation.num_sequences, self._topology.device
        if not self._reads_samples:
            num_microbatches = self.num_microbatches(num_samples)
            return {
                name: itertools.repeat(_NO_SAMPLES, num_microbatches) for name in self._validation_samples
            }
        return {
            name: on_device(
                ReadAhead(pinned(self._reader(samples, num_samples=num_samples)(0), device)), device
            )
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

    def _reader(self, samples: Any, *, num_samples: int) -> Callable[[int], Iterator[Batch]]:
        """Return a function from the first of `num_samples` samples to this rank's microbatches of them.

        A thread that calls it must not refer to this object, which would then never be released.
        """
        config, topology = self._config, self._topology
        num_microbatches = self.num_microbatches(num_samples)

        def read(first_sample: int) -> Iterator[Batch]:
            return microbatches(
                samples,
                first_sample=first_sample,
                num_samples=num_samples,
                num_microbatches=num_microbatches,
                micro_batch_size=config.training.micro_batch_size,
                data_rank=topology.data_rank,
                data_size=topology.data_size,
                device=torch.device("cpu"),
                context_group=topology.context_group,
            )

        return read
