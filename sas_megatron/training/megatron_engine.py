"""Training with Megatron-core's data parallelism, optimizers and pipeline schedules."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from typing_extensions import override

from sas_megatron.checkpoint.restoring import Checkpoint, restore_tensors
from sas_megatron.checkpoint.sharded_tensors import shard_weights
from sas_megatron.config.run import RunConfig
from sas_megatron.model.initialization import global_name
from sas_megatron.model.language_loss import Batch, forward_step
from sas_megatron.training.engine import Engine, ForwardStep, Reports, TrainedTensor, is_first_replica
from sas_megatron.training.gradient_norm import clip_gradients, compute_gradient_norm, finalize_gradients
from sas_megatron.training.optimizer import build_optimizer, build_schedule
from sas_megatron.training.optimizer_states import (
    read_num_updates,
    set_num_updates,
    shard_optimizer,
    updated_parameters,
)


class MegatronEngine(Engine):
    """Float32 gradient buffers that are reduced over the data ranks, and AdamW.

    With `optimizer.distributed`, AdamW's states are sharded over the data ranks.
    """

    def __init__(self, config: RunConfig, model_chunks: list[Any]) -> None:
        self.config = config
        self.model_chunks = model_chunks
        self.ddp_chunks = [
            self._wrap(chunk, is_first=index == 0) for index, chunk in enumerate(self.model_chunks)
        ]
        self.optimizer = build_optimizer(config, self.ddp_chunks)
        self.schedule = build_schedule(config, self.optimizer)
        self.run_schedule = get_forward_backward_func()
        # The pipeline schedules read the config of the first chunk; the layers of each chunk read their own.
        transformer = self.model_chunks[0].config
        transformer.grad_scale_func = self.optimizer.scale_loss
        transformer.finalize_model_grads_func = finalize_gradients
        if config.parallel.overlap_gradient_reduce:
            # Only the last microbatch of a step starts the gradient reduction.
            no_sync = [chunk.no_sync for chunk in self.ddp_chunks]
            transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def _wrap(self, chunk: Any, *, is_first: bool) -> DistributedDataParallel:
        chunk.config.calculate_per_token_loss = True
        parallel = self.config.parallel
        module = Float16Module(chunk.config, chunk) if self.config.training.precision == "bfloat16" else chunk
        return DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=self.config.optimizer.distributed,
                overlap_grad_reduce=parallel.overlap_gradient_reduce,
                overlap_param_gather=parallel.overlap_parameter_gather,
            ),
            module,
            # The gradients of the first chunk are complete last, so that only their reduction can be exposed.
            disable_bucketing=not is_first,
        )

    @override
    def forward_backward(self, batches: Iterator[Batch], *, num_microbatches: int) -> Reports:
        """Run Megatron-core's schedule for the layout: without pipeline, 1F1B, or interleaved 1F1B."""
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(forward_step, batches, num_microbatches=num_microbatches, forward_only=False)

    @override
    def compute_gradient_norm(self) -> torch.Tensor:
        """Return the norm that Megatron-core computes; each parameter counts once, replicas do not."""
        self.optimizer.prepare_grads()
        return compute_gradient_norm(self.optimizers())

    @override
    def update(self, gradient_norm: float) -> None:
        """Clip and update as Megatron-core's `step` does."""
        max_norm = self.config.optimizer.clip_gradient_norm
        if max_norm > 0:
            clip_gradients(self.optimizers(), max_norm=max_norm, gradient_norm=gradient_norm)
        self.optimizer.step_with_ready_grads()

    @override
    def skip_update(self) -> None:
        """Do nothing: the next step zeroes the gradient buffers."""

    @override
    @torch.no_grad()
    def forward(
        self, forward_step: ForwardStep, batches: Iterator[Batch], *, num_microbatches: int
    ) -> Reports:
        """Run the same schedule, forward only."""
        for chunk in self.ddp_chunks:
            chunk.eval()
        reports = self._run(forward_step, batches, num_microbatches=num_microbatches, forward_only=True)
        for chunk in self.ddp_chunks:
            chunk.train()
        return reports

    def _run(
        self,
        forward_step: ForwardStep,
        batches: Iterator[Batch],
        *,
        num_microbatches: int,
        forward_only: bool,
    ) -> Reports:
        # The chunks of an interleaved stage read the same microbatches at different times. `itertools.tee`
        # keeps up to 57 batches alive, so that it is not used for a single chunk.
        num_chunks = len(self.ddp_chunks)
        batches_by_chunk = itertools.tee(batches, num_chunks) if num_chunks > 1 else (batches,)
        reports: Reports = self.run_schedule(
            forward_step_func=forward_step,
            data_iterator=list(batches_by_chunk),
            model=self.ddp_chunks,
            num_microbatches=num_microbatches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )
        return reports

    @override
    def shards(self) -> list[ShardedTensor]:
        """Return the weights, AdamW's moments, and its float32 weights if the model has another dtype."""
        self.sync_parameters()
        optimizers = self.optimizers()
        return shard_weights(self.model_chunks) + [
            shard for optimizer in optimizers for shard in shard_optimizer(optimizer, self.model_chunks)
        ]

    @override
    def counts(self) -> dict[str, int]:
        """Return the number of AdamW updates."""
        return {"num_updates": max(map(read_num_updates, self.optimizers()))}

    @override
    def write_files(self, folder: Path) -> None:
        """Do nothing: everything is in the tensors."""

    @override
    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Load the tensors, which are resharded if the layout differs from the one that saved them."""
        restore_tensors(checkpoint, self.shards())
        for optimizer in self.optimizers():
            set_num_updates(optimizer, checkpoint.progress["engine"]["num_updates"])

    @override
    def trained_tensors(self) -> Iterator[TrainedTensor]:
        """Yield the tensors that AdamW updates in place: weights, float32 copies, or this rank's shards."""
        names = {
            parameter: global_name(chunk, name)
            for chunk in self.model_chunks
            for name, parameter in chunk.named_parameters()
        }
        for optimizer in self.optimizers():
            for parameter, main, first_element in updated_parameters(optimizer):
                yield TrainedTensor(
                    names[parameter],
                    parameter,
                    first_element,
                    main.detach,
                    functools.partial(getattr, main, "grad"),
                    is_first_replica(parameter, sharded_over_data=self.config.optimizer.distributed),
                )

    @override
    def sync_parameters(self) -> None:
        """All-gather the updated parameters now, if they would be gathered in the next forward pass."""
        if self.config.parallel.overlap_parameter_gather:
            for chunk in self.ddp_chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()

    def optimizers(self) -> list[Any]:
        """Return Megatron-core's optimizer, or the optimizers that it chains."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))


def main_parameters(optimizer: Any) -> list[torch.Tensor]:
    """Return the tensors that AdamW updates: weights, float32 copies of them, or this rank's shards."""
    return [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
