"""What trains the model: the one interface that steps, evaluation and checkpoints know.

    accumulate(batches) -> gradients -> measure_gradients() -> [loss and norm are judged]
      -> update() -> weights, or drop_gradients()

Two engines implement it: Megatron-core's own DDP and optimizers (`megatron_engine`), and DeepSpeed's
ZeRO (`deepspeed_engine`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from sas_megatron.checkpoint.initial_weights import load_initial_weights
from sas_megatron.checkpoint.restoring import Checkpoint
from sas_megatron.config.run import RunConfig
from sas_megatron.model.assembly import build_gpt_chunks
from sas_megatron.model.language_loss import Batch

ForwardStep = Callable[..., Any]
Reports = list[dict[str, torch.Tensor]]


class Engine(ABC):
    """The live objects of a run on this rank.

    `pieces` are this rank's parts of the model without any wrapper: one, or several where pipeline
    stages interleave.
    """

    config: RunConfig
    pieces: list[Any]
    schedule: OptimizerParamScheduler

    @abstractmethod
    def accumulate(self, batches: Iterator[Batch], *, num_microbatches: int) -> Reports:
        """Forward and backward over a step's microbatches, from zeroed gradients.

        Returns:
            The report of each microbatch on the pipeline's last stage; nothing on the others.
        """

    @abstractmethod
    def measure_gradients(self) -> float:
        """The norm of the accumulated gradients over all ranks, before clipping; leaves weights alone."""

    @abstractmethod
    def update(self, gradient_norm: float) -> None:
        """Applies the accumulated gradients, clipped by the norm that `measure_gradients` gave."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """In place of `update`: weights and optimizer stay as they are."""

    @abstractmethod
    def sync_parameters(self) -> None:
        """Makes this rank's weights those of the last update, where that would be left to the next step."""

    @abstractmethod
    def forward(
        self, forward_step: ForwardStep, batches: Iterator[Batch], *, num_microbatches: int
    ) -> Reports:
        """Runs the model without gradients and without dropout; reports as `accumulate` does."""

    @abstractmethod
    def shards(self) -> list[ShardedTensor]:
        """What a checkpoint needs of this rank's tensors: the weights, and what else `restore` reads."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """What it needs beside tensors, the same on every rank."""

    @abstractmethod
    def write_files(self, folder: Path) -> None:
        """Writes what the engine saves in a format of its own into a checkpoint's folder; all ranks do."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Puts a checkpoint of this engine into it, freshly assembled; every rank must call it.

        Raises:
            FileProblem: the checkpoint is of another model, or of a layout that the engine cannot load.
        """


def assemble(config: RunConfig, *, initial_weights: Path | None = None) -> Engine:
    """Builds model, optimizer and schedule on this rank, by `training.engine`; its groups must exist.

    Args:
        config: The run.
        initial_weights: What to begin with (as `checkpoint.initial_weights`) in place of drawn weights.
    """
    pieces = build_gpt_chunks(config)
    if initial_weights is not None:  # before the optimizer copies them
        load_initial_weights(initial_weights, pieces, config)
    if config.training.engine == "deepspeed":
        from sas_megatron.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config, pieces)
    from sas_megatron.training.megatron_engine import MegatronEngine

    return MegatronEngine(config, pieces)
