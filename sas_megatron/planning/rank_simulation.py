"""One rank of a run, simulated: what it holds, computes and sends in a step of the real training code.

    config, rank -> fake world -> the engine -> an update and a forward pass, for what is made once
      -> two steps of few microbatches, counted -> the step of all microbatches, by their difference

A step is a fixed part and a part for each microbatch, once there are enough of them to fill the
pipeline; so two short steps tell all longer ones exactly.
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

from sas_megatron.config.run import RunConfig
from sas_megatron.distributed.topology import Topology, build_communication_counter
from sas_megatron.model.assembly import build_gpt_chunks
from sas_megatron.model.language_loss import Batch, forward_step
from sas_megatron.planning.fake_world import fake_world
from sas_megatron.planning.memory_meter import MemoryMeter, distinct_bytes
from sas_megatron.planning.operation_meter import OperationMeter
from sas_megatron.planning.tally import Tally
from sas_megatron.training.engine import Reports
from sas_megatron.training.megatron_engine import MegatronEngine, main_parameters
from sas_megatron.training.step import train_step


@dataclass(frozen=True)
class StepTally:
    """One step: forward and backward passes with the reduction of gradients at their end; then the update."""

    microbatches: Tally
    update: Tally


@dataclass(frozen=True)
class RankReport:
    """What one rank holds, and does in one optimizer step."""

    rank: int
    # The ranks of its groups, by the ledger's names.
    group_ranks: dict[str, list[int]]
    num_layers: int
    num_heads: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    # The most held at once, all the above included: while microbatches run, and while weights are updated.
    microbatches_peak_bytes: int
    update_peak_bytes: int
    num_microbatches: int
    # Forward and backward passes with the reduction of gradients at their end; then the rest of the step.
    microbatches: Tally
    update: Tally

    @property
    def static_bytes(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> int:
        """The most held at once in a step."""
        return max(self.microbatches_peak_bytes, self.update_peak_bytes)

    @property
    def activation_bytes(self) -> int:
        """The most that activations and temporaries hold beside parameters, gradients and optimizer state."""
        return self.peak_bytes - self.static_bytes

    @property
    def step(self) -> Tally:
        """The whole step."""
        return self.microbatches + self.update


def simulate_rank(config: RunConfig, *, rank: int, world_size: int) -> RankReport:
    """Builds and steps the real model as `rank` of `world_size`; see `fake_world` for what it needs.

    Raises:
        UserError: the layout does not fit the world size.
    """
    data_parallel = config.check_world_size(world_size)
    num_microbatches = config.training.num_microbatches(data_parallel)
    with fake_world(config.parallel, rank=rank, world_size=world_size) as topology, MemoryMeter() as memory:
        stepper = Stepper(config, topology, memory)
        counts = _measured_microbatches(config, num_microbatches)
        steps = [stepper.step(count) for count in counts]
        phases = [
            _extrapolated(phase, counts, num_microbatches)
            for phase in ([step.microbatches for step in steps], [step.update for step in steps])
        ]
        return stepper.report(num_microbatches=num_microbatches, step=StepTally(*phases))


def _extrapolated(measured: list[Tally], counts: list[int], wanted: int) -> Tally:
    """Of `wanted` microbatches: on the line through those of two counts, or the only one."""
    if len(counts) == 1:
        return measured[0]
    per_microbatch = (measured[1] + measured[0] * -1) * (1 / (counts[1] - counts[0]))
    return measured[0] + per_microbatch * (wanted - counts[0])


def _measured_microbatches(config: RunConfig, num_microbatches: int) -> list[int]:
    """How many microbatches to step with: two numbers to tell the others by, or the one that is wanted.

    A pipeline of p stages holds what it will ever hold at p microbatches; its interleaved schedule,
    which takes them in rounds of p and runs at most (v+1)·p - 2 pieces ahead, at two rounds.
    """
    stages = config.parallel.pipeline
    counts = [stages, stages + config.parallel.microbatch_turns]
    return counts if num_microbatches > counts[1] else [num_microbatches]


class Stepper:
    """A training engine on made-up batches that counts what each of its steps does.

    It works on real ranks as on simulated ones.

    `memory` must be entered before this is built, and through all steps.
    """

    def __init__(self, config: RunConfig, topology: Topology, memory: MemoryMeter) -> None:
        self.config = config
        self.topology = topology
        self.memory = memory
        self.engine = _WatchedEngine(config, self)
        self._meters = _Meters(topology)
        self._microbatches = Tally()
        self._warm_up()
        self.microbatches_peak_bytes = 0
        self.update_peak_bytes = 0

    def _warm_up(self) -> None:
        """Makes the optimizer's state and the tables of rotary positions, which later steps find."""
        turns = self.config.parallel.microbatch_turns
        if self.config.parallel.overlap_parameter_gather:
            # A whole step: the next one gathers the parameters that this one updates.
            self.run(turns)
            return
        self.engine.update(self.engine.measure_gradients())
        self.engine.forward(forward_step, self._batches(), num_microbatches=turns)

    def step(self, num_microbatches: int) -> StepTally:
        """One optimizer step, counted."""
        self._meters = _Meters(self.topology)
        with _without_garbage(), self._meters:
            self.memory.reset_peak()
            self.run(num_microbatches)
        self.update_peak_bytes = self.memory.peak_bytes
        whole = self._meters.tally()
        return StepTally(self._microbatches, whole + self._microbatches * -1)

    def run(self, num_microbatches: int) -> None:
        """One optimizer step, uncounted but for the memory."""
        train_step(self.engine, self._batches(), num_microbatches=num_microbatches, topology=self.topology)

    def report(self, *, num_microbatches: int, step: StepTally) -> RankReport:
        """What the rank holds after its last step, with the tallies of one."""
        parameters = [parameter for piece in self.engine.pieces for parameter in piece.parameters()]
        gradients = [parameter.main_grad for parameter in parameters]
        optimizer = [tensor for part in self.engine.optimizers() for tensor in _optimizer_tensors(part)]
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
                for piece in self.engine.pieces
                for module in piece.modules()
            ),
            num_heads=attention.num_attended_heads // parallel.tensor // parallel.context,
            num_parameters=sum(parameter.numel() for parameter in parameters),
            parameter_bytes=distinct_bytes(parameters),
            gradient_bytes=distinct_bytes(gradients),
            optimizer_bytes=distinct_bytes(optimizer, without=[*parameters, *gradients]),
            microbatches_peak_bytes=self.microbatches_peak_bytes,
            update_peak_bytes=self.update_peak_bytes,
            num_microbatches=num_microbatches,
            microbatches=step.microbatches,
            update=step.update,
        )

    def note_microbatches(self) -> None:
        """To be called between the microbatches and the update: what was counted so far is theirs."""
        self._microbatches = self._meters.tally()
        self.microbatches_peak_bytes = self.memory.peak_bytes
        self.memory.reset_peak()

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield made_up_batch(self.config, torch.device("cpu"))


def made_up_batch(config: RunConfig, device: torch.device) -> Batch:
    """A microbatch shaped as `data.batches.microbatches` gives them; all tokens are the first."""
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


class _WatchedEngine(MegatronEngine):
    """The engine as it is, but that it says when a step's microbatches are done."""

    def __init__(self, config: RunConfig, stepper: Stepper) -> None:
        super().__init__(config, build_gpt_chunks(config))
        self._stepper = stepper

    def accumulate(self, batches: Iterator[Batch], *, num_microbatches: int) -> Reports:
        """The engine's."""
        reports = super().accumulate(batches, num_microbatches=num_microbatches)
        self._stepper.note_microbatches()
        return reports


class _Meters(contextlib.ExitStack):
    """The operation meter and the wire ledger, entered together and read as one tally."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        self.operations = OperationMeter()
        self.ledger = build_communication_counter(topology)

    def __enter__(self) -> _Meters:
        super().__enter__()
        self.enter_context(self.operations)
        self.enter_context(self.ledger)
        return self

    def tally(self) -> Tally:
        """What was counted so far."""
        plain: list[Any] = [self.ledger.bytes_sent, self.ledger.calls]
        by_group = ({group: dict(counts) for group, counts in part.items()} for part in plain)
        return Tally(dict(self.operations.calls), *by_group)


@contextlib.contextmanager
def _without_garbage() -> Iterator[None]:
    """Collects cycles before and none within, so that the peak does not depend on when Python does."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """Moments and full-precision weights of one of Megatron-core's optimizers."""
    yield from main_parameters(optimizer)
    for state in optimizer.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
