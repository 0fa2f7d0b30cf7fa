"""A few optimizer steps on ranks, on samples made on the spot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sas_megatron.config.run import RunConfig
from tests.model.model_parts import WeightPart, weight_parts
from tests.rank_pool import in_layout

NUM_STEPS = 5


@dataclass
class Steps:
    """What one rank saw: losses before each update and after the last, gradient norms, final weights."""

    losses: list[float]
    gradient_norms: list[float]
    weights: dict[str, WeightPart]
    data_rank: int


class RandomSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sample i depends on i alone; some tokens of each bear no loss, another number in each."""

    def __init__(self, config: RunConfig) -> None:
        self.vocab_size, self.length = config.model.vocab_size, config.data.sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(self.vocab_size, (self.length + 1,), generator=generator)
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": (torch.rand(self.length, generator=generator) < 0.8).float(),
            "position_ids": torch.arange(self.length),
        }


def take_steps(config: RunConfig) -> Steps:
    """On a rank: `NUM_STEPS` updates, and one step more for the loss after them."""
    from sas_megatron.data.batches import microbatches
    from sas_megatron.training.assembly import assemble
    from sas_megatron.training.step import train_step

    topology = in_layout(config.parallel)
    trainer = assemble(config)
    training, samples = config.training, RandomSamples(config)
    losses, norms, weights = [], [], {}
    for step in range(NUM_STEPS + 1):
        if step == NUM_STEPS:
            weights = weight_parts(trainer.model_chunks[0].module)
        batches = microbatches(
            samples,
            first_sample=step * training.global_batch_size,
            num_samples=training.global_batch_size,
            micro_batch_size=training.micro_batch_size,
            data_rank=topology.data_rank,
            data_size=topology.data_size,
            device=topology.device,
        )
        per_rank = training.global_batch_size // training.micro_batch_size // topology.data_size
        result = train_step(trainer, batches, step=step + 1, num_microbatches=per_rank, topology=topology)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        assert next(batches, None) is None, "a step must use all its microbatches"
    return Steps(losses, norms, weights, topology.data_rank)


def replicas_that_differ(by_rank: list[Steps]) -> list[str]:
    """Names of parameters whose copies are not equal to the bit: over all ranks, or those of one part."""
    differing = []
    for name, first in by_rank[0].weights.items():
        tensor_size = len([steps for steps in by_rank if steps.data_rank == 0])
        for rank, steps in enumerate(by_rank):
            original = by_rank[rank % tensor_size if first.dim is not None else 0]
            if not torch.equal(steps.weights[name].tensor, original.weights[name].tensor):
                differing.append(f"{name} on rank {rank}")
    return differing


def steps_without(fault: str, config: RunConfig) -> Any:
    """On a rank: `take_steps` with one sum of gradients left out."""
    from sas_megatron.attention import simulated_layer
    from sas_megatron.training import assembly

    kept_sum, kept_finalize = simulated_layer.sum_gradients_over, assembly.finalize_model_grads
    if fault == "simulation":
        simulated_layer.sum_gradients_over = lambda _group, weights: tuple(weights)
    else:
        assembly.finalize_model_grads = _finalize_without_norms
    try:
        return take_steps(config)
    finally:
        simulated_layer.sum_gradients_over, assembly.finalize_model_grads = kept_sum, kept_finalize


def _finalize_without_norms(model: list[Any], *arguments: Any, **options: Any) -> None:
    from megatron.core.distributed import finalize_model_grads

    for chunk in model:
        for parameter in chunk.parameters():
            parameter.sequence_parallel = False
    finalize_model_grads(model, *arguments, **options)
