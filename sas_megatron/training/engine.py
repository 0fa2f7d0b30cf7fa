"""The interface through which the training loop, evaluation and checkpoints use the model.

forward_backward(batches) -> compute_gradient_norm() -> [check] -> update() or skip_update()

Two engines implement it: `megatron_engine` (Megatron-core's data parallelism and optimizers) and
`deepspeed_engine` (DeepSpeed's ZeRO). `build` constructs the one that the config selects.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from sas_megatron.checkpoint.restoring import Checkpoint
from sas_megatron.config.run import RunConfig
from sas_megatron.model.language_loss import Batch

# Megatron-core's protocol: (batches, model) -> (output, function of the output that returns loss, number of
# tokens and report).
ForwardStep = Callable[..., Any]
# One dictionary per microbatch; `loss` holds the summed loss and the number of tokens.
Reports = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class TrainedTensor:
    """Float32 values that the optimizer updates: this rank's shard of a parameter, or a range of the shard.

    Attributes:
        name: Global name of the parameter.
        parameter: The parameter of the model.
        first_element: Index in the shard's elements at which the range begins.
        read_weights: Returns the values; all ranks that hold the parameter must call it.
        read_gradient: Returns their gradient between `compute_gradient_norm` and `update`, before clipping.
            All ranks that hold the parameter must call it.
        is_counted: Whether this rank's values belong in sums over all ranks, in which each element occurs
            once.
    """

    name: str
    parameter: torch.nn.Parameter
    first_element: int
    read_weights: Callable[[], torch.Tensor]
    read_gradient: Callable[[], torch.Tensor]
    is_counted: bool


class Engine(ABC):
    """The model, optimizer and learning-rate schedule of this rank.

    `model_chunks` are this rank's parts of the model without data-parallel wrappers: one, or several if
    pipeline stages interleave.
    """

    config: RunConfig
    model_chunks: list[Any]
    schedule: OptimizerParamScheduler

    @abstractmethod
    def forward_backward(self, batches: Iterator[Batch], *, num_microbatches: int) -> Reports:
        """Zero the gradients, then run forward and backward over the microbatches of a step.

        Returns:
            The report of each microbatch on the last pipeline stage; an empty list on the other stages.
        """

    @abstractmethod
    def compute_gradient_norm(self) -> float | torch.Tensor:
        """Return the norm of the accumulated gradients over all ranks, before clipping.

        It is the same float32 number on every rank, possibly a scalar tensor that the host has not read.
        """

    @abstractmethod
    def update(self, gradient_norm: float) -> None:
        """Clip the accumulated gradients by `gradient_norm` and apply one optimizer step."""

    @abstractmethod
    def skip_update(self) -> None:
        """Discard the accumulated gradients; weights and optimizer state stay unchanged."""

    @abstractmethod
    def trained_tensors(self) -> Iterator[TrainedTensor]:
        """Yield what the optimizer updates on this rank; every rank must read all of it, in this order."""

    @abstractmethod
    def sync_parameters(self) -> None:
        """Finish any parameter all-gather that the last update deferred to the next forward pass."""

    @abstractmethod
    def forward(
        self, forward_step: ForwardStep, batches: Iterator[Batch], *, num_microbatches: int
    ) -> Reports:
        """Run the model without gradients or dropout; return reports as `forward_backward` does."""

    @abstractmethod
    def shards(self) -> list[ShardedTensor]:
        """Return this rank's shards of the tensors that a checkpoint stores."""

    @abstractmethod
    def counts(self) -> dict[str, int]:
        """Return the counters that a checkpoint stores with the tensors; the same on every rank."""

    @abstractmethod
    def write_files(self, folder: Path) -> None:
        """Write files of the engine's own format into a checkpoint folder; every rank must call it."""

    @abstractmethod
    def restore(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint into this newly built engine; every rank must call it.

        Raises:
            FileProblem: The checkpoint is of another model, or of a layout that the engine cannot load.
        """


def is_first_replica(parameter: torch.nn.Parameter, *, sharded_over_data: bool) -> bool:
    """Return whether this rank's values of a parameter occur in sums over all ranks.

    Args:
        parameter: A parameter of the model.
        sharded_over_data: Whether each data and context rank has other elements of the parameter.
    """
    is_shard = getattr(parameter, "tensor_model_parallel", False)
    is_counted_by_tensor = is_shard or parallel_state.get_tensor_model_parallel_rank() == 0
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return is_counted_by_tensor and (sharded_over_data or data_rank == 0)
