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
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from sas_megatron.config.run import RunConfig
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
    def settle_parameters(self) -> None:
        """Makes this rank's weights those of the last update, where that would be left to the next step."""

    @abstractmethod
    def forward(
        self, forward_step: ForwardStep, batches: Iterator[Batch], *, num_microbatches: int
    ) -> Reports:
        """Runs the model without gradients and without dropout; reports as `accumulate` does."""

    @abstractmethod
    def capture(self, folder: Path) -> dict[str, Any]:
        """Weights and optimizer of this rank as plain containers of tensors, for its checkpoint file.

        An engine with a format of its own writes that into the checkpoint's `folder` in their place.
        """

    @abstractmethod
    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Puts what `capture` returned and wrote into this freshly assembled engine, on the same layout."""


def assemble(config: RunConfig) -> Engine:
    """Builds model, optimizer and schedule on this rank, by `training.engine`; its groups must exist."""
    if config.training.engine == "deepspeed":
        from sas_megatron.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(config)
    from sas_megatron.training.megatron_engine import MegatronEngine

    return MegatronEngine(config)
