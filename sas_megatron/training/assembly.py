"""From a config to everything that a training step needs: model, optimizer, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from sas_megatron.config.run import RunConfig
from sas_megatron.model.assembly import build_gpt
from sas_megatron.training.optimizer import build_optimizer, build_schedule


@dataclass
class Trainer:
    """The live objects of a run on this rank."""

    config: RunConfig
    model_chunks: list[Any]
    optimizer: Any
    schedule: OptimizerParamScheduler
    run_schedule: Any


def assemble(config: RunConfig) -> Trainer:
    """Builds model, optimizer and schedule on this rank; the process groups must exist."""
    model = build_gpt(config)
    transformer = model.config
    transformer.calculate_per_token_loss = True
    transformer.finalize_model_grads_func = finalize_model_grads
    if config.training.precision == "bfloat16":
        model = Float16Module(transformer, model)
    chunk = DistributedDataParallel(
        transformer,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=config.optimizer.distributed
        ),
        model,
    )
    optimizer = build_optimizer(config, [chunk])
    transformer.grad_scale_func = optimizer.scale_loss
    return Trainer(config, [chunk], optimizer, build_schedule(config, optimizer), get_forward_backward_func())
