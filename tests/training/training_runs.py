"""A few optimizer steps on ranks, with random samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from sas_megatron.config.run import RunConfig
from tests.model.model_parts import WeightPart, weight_parts
from tests.rank_pool import in_layout

NUM_STEPS = 6  # the last loss is the one after five updates


@dataclass
class Steps:
    """The results of one rank: the loss before each update, and its shards of weights and gradients."""

    losses: list[float]
    gradient_norms: list[float]
    initial_weights: dict[str, WeightPart]
    # Gradients of the first step, summed over all ranks.
    gradients: dict[str, WeightPart]
    weights: dict[str, WeightPart]
    # Measured inside the model: the forward pass before the first step, and the update of this step.
    probe: list[dict[str, Any]]
    update: list[dict[str, Any]]
    tensor_rank: int
    # Pipeline, context and data rank; ranks that differ only in their tensor rank have the same index.
    group_index: tuple[int, int, int]


class RandomSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random samples that depend on their index alone; a different number of tokens in each has no loss.

    If document ends reset attention, positions restart at random tokens.
    """

    def __init__(self, config: RunConfig) -> None:
        self.vocab_size, self.length = config.model.vocab_size, config.data.sequence_length
        self.resets = config.data.reset_at_document_ends

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(self.vocab_size, (self.length + 1,), generator=generator)
        loss_mask = (torch.rand(self.length, generator=generator) < 0.8).float()
        positions = torch.arange(self.length)
        if self.resets:
            starts = torch.where(torch.rand(self.length, generator=generator) < 0.2, positions, 0)
            positions = positions - starts.cummax(dim=0).values
        return {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": loss_mask,
            "position_ids": positions,
        }


def batches_of_step(config: RunConfig, topology: Any, step: int) -> Iterator[Any]:
    """Return, on a rank, its microbatches of `RandomSamples` in step `step`, counted from 0."""
    from sas_megatron.data.batches import microbatches

    training = config.training
    return microbatches(
        RandomSamples(config),
        first_sample=step * training.global_batch_size,
        num_samples=training.global_batch_size,
        num_microbatches=training.num_microbatches(topology.data_size),
        micro_batch_size=training.micro_batch_size,
        data_rank=topology.data_rank,
        data_size=topology.data_size,
        device=topology.device,
        context_group=topology.context_group,
        with_segments=config.data.reset_at_document_ends,
    )


def probe_batches(config: RunConfig, topology: Any) -> Any:
    """Return an object that gives a probe the first of `RandomSamples`."""
    from sas_megatron.training.run_data import RunData

    data: Any = SimpleNamespace(
        _config=config, _topology=topology, _validation_samples={"validation": RandomSamples(config)}
    )
    data.probe_batches = lambda: RunData.probe_batches(data)
    return data


def take_steps(config: RunConfig) -> Steps:
    """Make `NUM_STEPS` updates on a rank."""
    from sas_megatron.evaluation.probes import probe_model
    from sas_megatron.training.build import build_engine
    from sas_megatron.training.run_probe import UpdateMeasurement
    from sas_megatron.training.step import train_step

    topology = in_layout(config.parallel)
    engine = build_engine(config)
    per_rank = config.training.num_microbatches(topology.data_size)
    initial_weights = weight_parts(engine.model_chunks, weight_reader(engine))
    probe = []
    if config.evaluation.probe_sequences:
        probe = probe_model(engine, probe_batches(config, topology), config=config, topology=topology)
    losses, norms, gradients = [], [], {}
    update, measurement = engine.update, UpdateMeasurement(engine)

    def first_update(gradient_norm: float) -> None:
        gradients.update(weight_parts(engine.model_chunks, gradient_reader(engine)))
        engine.update = update
        measurement.before_update()
        update(gradient_norm)
        measurement.after_update()

    engine.update = first_update
    for step in range(NUM_STEPS):
        batches = batches_of_step(config, topology, step)
        result = train_step(engine, batches, num_microbatches=per_rank, topology=topology)
        assert result.is_applied, result.findings
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        assert next(batches, None) is None, "a step must use all its microbatches"
    if config.training.engine == "megatron":
        engine.sync_parameters()
    return Steps(
        losses,
        norms,
        initial_weights,
        gradients,
        weight_parts(engine.model_chunks, weight_reader(engine)),
        probe,
        measurement.results(),
        topology.tensor_rank,
        (topology.pipeline_rank, topology.context_rank, topology.data_rank),
    )


def complete_with_callback(config: RunConfig, rank: int, callback: Callable[[Any], None]) -> None:
    """Complete a run on this rank; rank `rank` calls `callback(run)` before each step."""
    from sas_megatron.training.loop import Run

    topology = in_layout(config.parallel, seed=config.training.seed)
    run = Run(config, topology)
    if topology.rank == rank:
        original = run.data.training_batches

        def batches_after_callback(first_sample: int) -> Any:
            callback(run)
            return original(first_sample)

        run.data.training_batches = batches_after_callback  # type: ignore[method-assign]
    run.complete()


def weight_reader(engine: Any) -> Callable[[Any], torch.Tensor]:
    """Return a function that returns a parameter's weights, gathered if they are sharded over data ranks."""
    if engine.config.training.engine == "megatron" or engine.config.deepspeed.zero_stage < 3:
        return torch.detach

    def gathered(parameter: Any) -> torch.Tensor:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    return gathered


def gradient_reader(engine: Any) -> Callable[[Any], torch.Tensor]:
    """Return a function that returns a parameter's gradient after `forward_backward`.

    The gradient is gathered if it is sharded over the data ranks.
    """
    if engine.config.training.engine == "deepspeed":
        from deepspeed.utils import safe_get_full_grad

        stage = engine.config.deepspeed.zero_stage
        return safe_get_full_grad if stage else lambda parameter: parameter.grad
    if engine.config.optimizer.distributed:
        for chunk in engine.ddp_chunks:
            for buffer in chunk.buffers:
                for bucket in buffer.buckets:
                    group = buffer.data_parallel_group
                    shard = bucket.grad_data.chunk(group.size())[group.rank()]
                    dist.all_gather_into_tensor(bucket.grad_data, shard.clone(), group=group)
    return lambda parameter: parameter.main_grad


def tensor_groups(by_rank: list[Steps]) -> list[list[Steps]]:
    """Group the ranks that differ only in their tensor rank, in the order of their tensor ranks."""
    groups: dict[tuple[int, int, int], list[Steps]] = {}
    for steps in sorted(by_rank, key=lambda steps: steps.tensor_rank):
        groups.setdefault(steps.group_index, []).append(steps)
    return list(groups.values())


def find_differing_replicas(by_rank: list[Steps]) -> list[str]:
    """Return the names of parameters whose replicas are not bit-identical."""
    first_replicas: dict[tuple[str, int], torch.Tensor] = {}
    differing = []
    for rank, steps in enumerate(by_rank):
        for name, part in steps.weights.items():
            key = (name, -1 if part.dim is None else steps.tensor_rank)
            if not torch.equal(part.tensor, first_replicas.setdefault(key, part.tensor)):
                differing.append(f"{name} on rank {rank}")
    return differing


def steps_without(fault: str, config: RunConfig) -> Any:
    """Run `take_steps` on a rank without one of the gradient reductions."""
    from sas_megatron.attention.sas import layer as simulated_layer
    from sas_megatron.training import megatron_engine

    original_sum, original_finalize = simulated_layer.sum_gradients_over, megatron_engine.finalize_gradients
    if fault == "simulation":
        simulated_layer.sum_gradients_over = lambda _group, weights: tuple(weights)
    else:
        megatron_engine.finalize_gradients = _finalize_without_norms
    try:
        return take_steps(config)
    finally:
        simulated_layer.sum_gradients_over, megatron_engine.finalize_gradients = (
            original_sum,
            original_finalize,
        )


def _finalize_without_norms(model: list[Any], *arguments: Any, **options: Any) -> None:
    from megatron.core.distributed import finalize_model_grads

    for chunk in model:
        for parameter in chunk.parameters():
            parameter.sequence_parallel = False
    finalize_model_grads(model, *arguments, **options)
