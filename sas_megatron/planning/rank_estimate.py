"""Estimate one rank of a run: the memory, the operations and the communication of a real training step.

    config, rank -> fake world -> training engine
      -> an update and a forward pass, which create the tensors that last over all steps
      -> two counted steps of few microbatches -> the step of all microbatches, extrapolated from these two

The work of a step has a fixed part and a part per microbatch, once there are enough microbatches to fill
the pipeline. So two short steps determine every longer one exactly.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from typing_extensions import override

from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.topology import Topology, build_communication_counter
from sas_megatron.model.assembly import build_gpt_chunks
from sas_megatron.model.language_loss import Batch, forward_step
from sas_megatron.planning.fake_world import fake_world
from sas_megatron.planning.memory_meter import MemoryMeter, distinct_bytes
from sas_megatron.planning.operation_meter import OperationMeter
from sas_megatron.planning.workload import Workload
from sas_megatron.training.engine import Reports
from sas_megatron.training.megatron_engine import MegatronEngine, main_parameters
from sas_megatron.training.step import train_step


@dataclass(frozen=True)
class StepWorkload:
    """Work of one step in two phases."""

    # Forward and backward passes of all microbatches, with the reduction of the gradients at their end.
    microbatches: Workload
    # The rest of the step: gradient norm and optimizer.
    update: Workload


@dataclass(frozen=True)
class RankReport:
    """Memory of one rank, and its work in one optimizer step."""

    rank: int
    # Ranks of each of its process groups, by the group names of the communication counter.
    group_ranks: dict[str, list[int]]
    num_layers: int
    num_heads: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    # Peak memory of all tensors, parameters and optimizer state included, in each phase of the step.
    microbatches_peak_bytes: int
    update_peak_bytes: int
    num_microbatches: int
    # The two phases of the step, as in `StepWorkload`.
    microbatches: Workload
    update: Workload

    @property
    def static_bytes(self) -> int:
        """Bytes of parameters, gradients and optimizer state."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak memory of all tensors in a step."""
        return max(self.microbatches_peak_bytes, self.update_peak_bytes)

    @property
    def activation_bytes(self) -> int:
        """Peak memory of activations and temporaries: the peak without the static bytes."""
        return self.peak_bytes - self.static_bytes

    @property
    def step(self) -> Workload:
        """Work of the complete step."""
        return self.microbatches + self.update


def estimate_rank(config: RunConfig, *, rank: int, world_size: int) -> RankReport:
    """Build the real model and run its training step as `rank` of `world_size`, on tensors without storage.

    `fake_world` states the requirements on the process.

    Raises:
        UserError: The layout does not fit the world size.
    """
    data_parallel = config.check_world_size(world_size)
    num_microbatches = config.training.num_microbatches(data_parallel)
    with fake_world(config.parallel, rank=rank, world_size=world_size) as topology, MemoryMeter() as memory:
        profiler = StepProfiler(config, topology, memory)
        counts = _profiled_microbatches(config, num_microbatches)
        steps = [profiler.profile_step(count) for count in counts]
        phases = [
            _extrapolate(phase, counts, num_microbatches)
            for phase in ([step.microbatches for step in steps], [step.update for step in steps])
        ]
        return profiler.report(num_microbatches=num_microbatches, step=StepWorkload(*phases))


def _extrapolate(profiled: list[Workload], counts: list[int], num_microbatches: int) -> Workload:
    """Return the workload of `num_microbatches`, on the line through the two profiled workloads."""
    if len(counts) == 1:
        return profiled[0]
    per_microbatch = (profiled[1] + profiled[0] * -1) * (1 / (counts[1] - counts[0]))
    return profiled[0] + per_microbatch * (num_microbatches - counts[0])


def _profiled_microbatches(config: RunConfig, num_microbatches: int) -> list[int]:
    """Return the two numbers of microbatches to profile, or only `num_microbatches` if it is small.

    A pipeline of p stages reaches its largest memory at p microbatches. The interleaved schedule takes
    microbatches in rounds of p and runs at most (v+1)·p - 2 model chunks ahead, so it needs two rounds.
    """
    stages = config.parallel.pipeline
    counts = [stages, stages + config.parallel.microbatch_group_size]
    return counts if num_microbatches > counts[1] else [num_microbatches]


class StepProfiler:
    """A training engine on synthetic batches that counts the work and the memory of its steps.

    It works both on real ranks and in a fake world. Its memory counts are valid only if the memory meter is
    entered before the profiler is built and stays entered during all steps.
    """

    def __init__(self, config: RunConfig, topology: Topology, memory: MemoryMeter) -> None:
        self.config = config
        self.topology = topology
        self.memory = memory
        self.engine = _ObservedEngine(config, self)
        self._meters = _Meters(topology)
        self._microbatches = Workload()
        self._warm_up()
        self.microbatches_peak_bytes = 0
        self.update_peak_bytes = 0

    def _warm_up(self) -> None:
        """Create the optimizer state and the tables of rotary embeddings, which all later steps reuse."""
        num_microbatches = self.config.parallel.microbatch_group_size
        if self.config.parallel.overlap_parameter_gather:
            # A complete step, since the next step gathers the parameters that this one updates.
            self.run_step(num_microbatches)
            return
        self.engine.update(float(self.engine.compute_gradient_norm()))
        self.engine.forward(forward_step, self._batches(), num_microbatches=num_microbatches)

    def profile_step(self, num_microbatches: int) -> StepWorkload:
        """Run one optimizer step and return its work."""
        self._meters = _Meters(self.topology)
        with _garbage_collection_disabled(), self._meters:
            self.memory.reset_peak()
            self.run_step(num_microbatches)
        self.update_peak_bytes = self.memory.peak_bytes
        total = self._meters.workload()
        return StepWorkload(self._microbatches, total + self._microbatches * -1)

    def run_step(self, num_microbatches: int) -> None:
        """Run one optimizer step without counting its work."""
        train_step(self.engine, self._batches(), num_microbatches=num_microbatches, topology=self.topology)

    def report(self, *, num_microbatches: int, step: StepWorkload) -> RankReport:
        """Return the memory of the rank after its last step, together with the work of `step`."""
        parameters = [parameter for chunk in self.engine.model_chunks for parameter in chunk.parameters()]
        gradients = [parameter.main_grad for parameter in parameters]
        optimizer_state = [
            tensor for optimizer in self.engine.optimizers() for tensor in _optimizer_tensors(optimizer)
        ]
        attention, parallel = self.config.attention, self.config.parallel
        return RankReport(
            rank=self.topology.rank,
            group_ranks={
                **{
                    name: dist.get_process_group_ranks(group)
                    for name, group in self.topology.groups().items()
                },
                "other": list(range(self.topology.world_size)),
            },
            num_layers=sum(
                isinstance(module, TransformerLayer)
                for chunk in self.engine.model_chunks
                for module in chunk.modules()
            ),
            num_heads=attention.num_attended_heads // parallel.tensor // parallel.context,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            parameter_bytes=distinct_bytes(parameters),
            gradient_bytes=distinct_bytes(gradients),
            optimizer_bytes=distinct_bytes(optimizer_state, without=[*parameters, *gradients]),
            microbatches_peak_bytes=self.microbatches_peak_bytes,
            update_peak_bytes=self.update_peak_bytes,
            num_microbatches=num_microbatches,
            microbatches=step.microbatches,
            update=step.update,
        )

    def end_microbatches(self) -> None:
        """Record the counts of the first phase, before the engine starts the update."""
        self._microbatches = self._meters.workload()
        self.microbatches_peak_bytes = self.memory.peak_bytes
        self.memory.reset_peak()

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield synthetic_batch(self.config, torch.device("cpu"))


def synthetic_batch(config: RunConfig, device: torch.device) -> Batch:
    """Return a microbatch with the shapes of `data.batches.microbatches`, in which all tokens are zero."""
    data, batch_size = config.data, config.training.micro_batch_size
    length = data.sequence_length
    shape = (batch_size, length // config.parallel.context)
    batch = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in ("tokens", "labels")}
    batch["loss_mask"] = torch.ones(shape, device=device)
    batch["position_ids"] = torch.zeros(shape, dtype=torch.int64, device=device)
    if data.reset_at_document_ends:
        shape_of_mask = (batch_size, 1, length, length)
        batch["attention_mask"] = torch.zeros(shape_of_mask, dtype=torch.bool, device=device)
    return batch


class _ObservedEngine(MegatronEngine):
    """The Megatron engine, which notifies the profiler when the microbatches of a step are finished."""

    def __init__(self, config: RunConfig, profiler: StepProfiler) -> None:
        super().__init__(config, build_gpt_chunks(config, draws_weights=False))
        self._profiler = profiler

    @override
    def forward_backward(self, batches: Iterator[Batch], *, num_microbatches: int) -> Reports:
        reports = super().forward_backward(batches, num_microbatches=num_microbatches)
        self._profiler.end_microbatches()
        return reports


class _Meters(contextlib.ExitStack):
    """The operation meter and the communication counter, entered together and read as one workload."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.operations = OperationMeter()
        self.communication = build_communication_counter(topology)

    def __enter__(self) -> _Meters:
        super().__enter__()
        self.enter_context(self.operations)
        self.enter_context(self.communication)
        return self

    def workload(self) -> Workload:
        """Return the work counted so far."""
        counters: list[Any] = [self.communication.bytes_sent, self.communication.calls]
        by_group = ({group: dict(counts) for group, counts in counter.items()} for counter in counters)
        return Workload(dict(self.operations.calls), *by_group)


@contextlib.contextmanager
def _garbage_collection_disabled() -> Iterator[None]:
    """Collect reference cycles before the block and not within, so that the peak memory is reproducible."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Yield the moments and the full-precision weights of one of Megatron-core's optimizers."""
    yield from main_parameters(optimizer)
    for state in optimizer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
