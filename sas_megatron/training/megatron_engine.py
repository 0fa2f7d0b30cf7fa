"""Training by Megatron-core's own data parallelism, optimizers and pipeline schedules."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from sas_megatron.checkpoint.restoring import Checkpoint, restore_tensors
from sas_megatron.checkpoint.sharded_tensors import shard_weights
from sas_megatron.config.run import RunConfig
from sas_megatron.model.language_loss import Batch, forward_step
from sas_megatron.training.engine import Engine, ForwardStep, Reports
from sas_megatron.training.optimizer import build_optimizer, build_schedule
from sas_megatron.training.optimizer_states import read_num_updates, set_num_updates, shard_optimizer


class MegatronEngine(Engine):
    """Gradients in float32 buffers, reduced over the data ranks; AdamW, its states sharded if asked for."""

    def __init__(self, config: RunConfig, pieces: list[Any]) -> None:
        self.config = config
        self.pieces = pieces
        self.chunks = [self._wrap(piece, is_first=index == 0) for index, piece in enumerate(self.pieces)]
        self.optimizer = build_optimizer(config, self.chunks)
        self.schedule = build_schedule(config, self.optimizer)
        self.run_schedule = get_forward_backward_func()
        # The schedules read the first piece's config; the layers of each read their own.
        transformer = self.pieces[0].config
        transformer.grad_scale_func = self.optimizer.scale_loss
        transformer.finalize_model_grads_func = finalize_model_grads
        if config.parallel.overlap_gradient_reduce:
            # Only the step's last microbatch sets the reduction off.
            no_sync = [chunk.no_sync for chunk in self.chunks]
            transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def _wrap(self, piece: Any, *, is_first: bool) -> DistributedDataParallel:
        piece.config.calculate_per_token_loss = True
        parallel = self.config.parallel
        module = Float16Module(piece.config, piece) if self.config.training.precision == "bfloat16" else piece
        return DistributedDataParallel(
            piece.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=self.config.optimizer.distributed,
                overlap_grad_reduce=parallel.overlap_gradient_reduce,
                overlap_param_gather=parallel.overlap_parameter_gather,
            ),
            module,
            # Of interleaved pieces only the first one's gradients come last, with nothing to hide behind.
            disable_bucketing=not is_first,
        )

    def accumulate(self, batches: Iterator[Batch], *, num_microbatches: int) -> Reports:
        """As Megatron-core's schedule for the layout runs it: plain, 1F1B or interleaved 1F1B."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(forward_step, batches, num_microbatches=num_microbatches, forward_only=False)

    def measure_gradients(self) -> float:
        """By Megatron-core, each parameter counted once."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def update(self, gradient_norm: float) -> None:
        """One AdamW step after clipping, as Megatron-core's `step` has it."""
        largest = self.config.optimizer.clip_gradient_norm
        for optimizer in self.optimizers() if largest > 0 else []:
            clip_grad_by_total_norm_fp32(
                optimizer.get_parameters(), max_norm=largest, total_norm=gradient_norm
            )
        self.optimizer.step_with_ready_grads()

    def drop_gradients(self) -> None:
        """Nothing to do: the next accumulation begins from zeroed buffers."""

    @torch.no_grad()
    def forward(
        self, forward_step: ForwardStep, batches: Iterator[Batch], *, num_microbatches: int
    ) -> Reports:
        """By the same schedule, forward only."""
        for chunk in self.chunks:
            chunk.eval()
        reports = self._run(forward_step, batches, num_microbatches=num_microbatches, forward_only=True)
        for chunk in self.chunks:
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
        # Each piece of an interleaved stage goes over the same microbatches, at its own time. A tee keeps
        # up to 57 batches alive, so a single piece does without.
        per_chunk = itertools.tee(batches, len(self.chunks)) if len(self.chunks) > 1 else (batches,)
        reports: Reports = self.run_schedule(
            forward_step_func=forward_step,
            data_iterator=list(per_chunk),
            model=self.chunks,
            num_microbatches=num_microbatches,
            seq_length=self.config.data.sequence_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )
        return reports

    def shards(self) -> list[ShardedTensor]:
        """Weights, AdamW's moments, and the float32 weights that it updates where the model's are others."""
        self.sync_parameters()
        optimizers = self.optimizers()
        return shard_weights(self.pieces) + [
            shard for optimizer in optimizers for shard in shard_optimizer(optimizer, self.pieces)
        ]

    def counts(self) -> dict[str, int]:
        """AdamW's updates."""
        return {"num_updates": max(map(read_num_updates, self.optimizers()))}

    def write_files(self, folder: Path) -> None:
        """None: all is in tensors."""

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Exact on the layout that saved it; on others the same numbers are shared out anew."""
        restore_tensors(checkpoint, self.shards())
        for optimizer in self.optimizers():
            set_num_updates(optimizer, checkpoint.progress["engine"]["num_updates"])

    def sync_parameters(self) -> None:
        """Gathers updated parameters now, where they would be gathered in the next forward pass."""
        if self.config.parallel.overlap_parameter_gather:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()

    def optimizers(self) -> list[Any]:
        """Megatron-core's optimizer, or each of those that it chains."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))


def main_parameters(optimizer: Any) -> list[torch.Tensor]:
    """What the inner AdamW updates: the weights, their float32 copies, or this rank's shards of those."""
    return [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
