"""Whether a layout computes what one process computes, on the user's devices and in the user's precision.

small version of the config -> three steps in one process, on every rank
                            -> three steps at the layout
  -> initial weights, gradients of the first step, losses -> relative errors -> findings

A missing sum over ranks, a wrong kernel or a faulty device changes a gradient by far more than rounding does.
Importing this module imports Megatron-core: call `platform.device.prepare_device` first.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.data.batches import microbatches
from sas_megatron.distributed.object_collectives import gather_from_ranks
from sas_megatron.distributed.topology import Topology, joined_groups, joined_topology
from sas_megatron.model.assembly import build_gpt_chunks
from sas_megatron.model.initialization import full_shape, global_name, tensor_parallel_shard
from sas_megatron.platform.device import process_group_backend
from sas_megatron.preflight.finding import Finding, failure, fine
from sas_megatron.preflight.layout_versions import NUM_STEPS, one_process_version, small_version
from sas_megatron.training.build import wrap_in_engine
from sas_megatron.training.engine import Engine, TrainedTensor
from sas_megatron.training.step import train_step

# Gradients below this share of the norm of all gradients may be rounding alone: a bias of all keys, for
# example, does not change the softmax. Their errors are relative to this share.
SMALLEST_SHARE = 1e-3
REMEDY = (
    "do not train with this layout; set the degrees of section parallel to 1, one at a time, to find the one "
    "that differs, and report it with this output"
)


@dataclass(frozen=True)
class Tolerance:
    """The largest relative errors between layouts in one precision."""

    gradient: float
    loss: float


TOLERANCES = {
    # Gradients: in one process their error relative to float64 is up to 3e-5 (the simulation of keys: softmax
    # ignores a term that all keys share, so its gradients are differences that nearly cancel), and both sides
    # have such errors. A missing sum over two ranks gives an error of 0.1 or more. Losses after a few steps:
    # Adam's division amplifies rounding errors.
    "float32": Tolerance(gradient=6e-5, loss=1e-5),
    # Gradients: attention itself, computed in bfloat16 by one process, has errors of up to 8e-2 in operations
    # before the softmax. Losses: engines round sums of gradients at different points.
    "bfloat16": Tolerance(gradient=1e-1, loss=2e-3),
}


@dataclass
class ErrorSums:
    """Sums of squares over the elements of a tensor: of the expected values, and of the differences."""

    expected: float = 0.0
    difference: float = 0.0

    def add(self, other: ErrorSums) -> None:
        """Add the sums over other elements."""
        self.expected += other.expected
        self.difference += other.difference


# By parameter name, in the order of the model.
ErrorsByName = dict[str, ErrorSums]


@dataclass
class OneProcess:
    """The results of one process: full tensors by parameter name, on the CPU, and the loss of each step."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)


def check_layout(
    config: RunConfig,
    *,
    device: torch.device,
    world_size: int,
    report: Callable[[list[Finding]], None],
) -> list[Finding]:
    """Train a small version of a config in one process and at its layout, and compare them.

    All ranks must call it, before their world is initialized. TF32 is off on this rank from then on.

    Args:
        config: The run.
        device: The device of this rank.
        world_size: The number of ranks that the launcher has started.
        report: Called on rank 0 with the findings while the other ranks wait, since a launcher may end all
            ranks when the first one exits with an error.

    Returns:
        The findings, the same on every rank.

    Raises:
        UserError: The config is not valid for this number of ranks.
    """
    small = small_version(config, world_size=world_size)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    expected = OneProcess()
    with _single_process(device, seed=small.training.seed) as topology:
        _train_one_process(one_process_version(small), topology, expected)
    minutes = config.training.collective_timeout_minutes
    with joined_topology(
        small.parallel, device=device, seed=small.training.seed, timeout_minutes=minutes
    ) as topology:
        findings = _compare_layout(small, topology, expected)
        if topology.is_rank0:
            report(findings)
        return findings


@contextlib.contextmanager
def _single_process(device: torch.device, *, seed: int) -> Iterator[Topology]:
    """Initialize a world of this process alone, and its groups."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # missing from torch's stubs
    dist.init_process_group(process_group_backend(device), store=store, rank=0, world_size=1)
    try:
        with joined_groups(ParallelConfig(), device=device, seed=seed) as topology:
            yield topology
    finally:
        dist.destroy_process_group()


def _train_one_process(config: RunConfig, topology: Topology, results: OneProcess) -> None:
    def keep(tensor: TrainedTensor) -> None:
        shape = tensor.parameter.shape
        results.weights[tensor.name], results.gradients[tensor.name] = (
            values.detach().to("cpu", torch.float64).view(shape)
            for values in (tensor.read_weights(), tensor.read_gradient())
        )

    results.losses = _train(config, topology, visit=keep)


def _compare_layout(config: RunConfig, topology: Topology, expected: OneProcess) -> list[Finding]:
    weights: ErrorsByName = {}
    gradients: ErrorsByName = {}

    def compare(tensor: TrainedTensor) -> None:
        values = {"weights": tensor.read_weights(), "gradients": tensor.read_gradient()}
        if not tensor.is_counted:
            return
        for sums, full, actual in (
            (weights, expected.weights, values["weights"]),
            (gradients, expected.gradients, values["gradients"]),
        ):
            local = _local_part(full[tensor.name], tensor, num_elements=actual.numel())
            difference = actual.detach().to("cpu", torch.float64).flatten() - local
            found = ErrorSums(_square_sum(local), _square_sum(difference))
            sums.setdefault(tensor.name, ErrorSums()).add(found)

    losses = _train(config, topology, visit=compare)
    merged_weights, merged_gradients = (
        _merge(gather_from_ranks(sums), order=list(expected.weights)) for sums in (weights, gradients)
    )
    tolerance = TOLERANCES[config.training.precision]
    return [
        _judge_tensors("layout weights", "initial weights", merged_weights, allowed=0.0),
        _judge_tensors("layout gradients", "gradient", merged_gradients, allowed=tolerance.gradient),
        _judge_losses(losses, expected.losses, allowed=tolerance.loss),
    ]


def _local_part(full: torch.Tensor, tensor: TrainedTensor, *, num_elements: int) -> torch.Tensor:
    """Return the elements of a full parameter that this rank's optimizer updates, [num_elements]."""
    shard = tensor_parallel_shard(full, tensor.parameter).flatten()
    return shard[tensor.first_element : tensor.first_element + num_elements]


def _merge(by_rank: list[ErrorsByName], *, order: list[str]) -> ErrorsByName:
    """Return the sums over all ranks; those of a tensor that no rank has are infinite."""
    merged: ErrorsByName = {}
    for name in order:
        merged[name] = ErrorSums()
        found = [of_rank[name] for of_rank in by_rank if name in of_rank]
        for sums in found or [ErrorSums(difference=math.inf)]:
            merged[name].add(sums)
    return merged


class _IndexedSamples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random samples that depend on their index alone."""

    def __init__(self, config: RunConfig) -> None:
        self.vocab_size, self.length = config.model.vocab_size, config.data.sequence_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        text = torch.randint(self.vocab_size, (self.length + 1,), generator=generator)
        # Samples differ in the number of tokens with a loss, so that means over samples are wrong.
        mask = torch.rand(self.length, generator=generator) < 0.8
        positions = torch.arange(self.length)
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": mask.float(), "position_ids": positions}


def _train(config: RunConfig, topology: Topology, *, visit: Callable[[TrainedTensor], None]) -> list[float]:
    """Take `NUM_STEPS` steps and return their losses.

    Args:
        config: The run.
        topology: The process groups.
        visit: Called before the first update for each tensor that the optimizer updates on this rank.
    """
    chunks = build_gpt_chunks(config)
    for chunk in chunks:
        _perturb(chunk)
    engine: Engine = wrap_in_engine(config, chunks)
    update = engine.update

    def first_update(gradient_norm: float) -> None:
        for tensor in engine.trained_tensors():
            visit(tensor)
        engine.update = update  # type: ignore[method-assign]
        update(gradient_norm)

    engine.update = first_update  # type: ignore[method-assign]
    training, losses = config.training, []
    for step in range(NUM_STEPS):
        num_microbatches = training.num_microbatches(topology.data_size)
        batches = microbatches(
            _IndexedSamples(config),
            first_sample=step * training.global_batch_size,
            num_samples=training.global_batch_size,
            num_microbatches=num_microbatches,
            micro_batch_size=training.micro_batch_size,
            data_rank=topology.data_rank,
            data_size=topology.data_size,
            device=topology.device,
            context_group=topology.context_group,
        )
        result = train_step(
            engine, batches, num_microbatches=num_microbatches, topology=topology, check=lambda *_: []
        )
        losses.append(result.loss)
    return losses


@torch.no_grad()
def _perturb(chunk: torch.nn.Module) -> None:
    """Add noise to vectors, and to matrices that start at 0, so that every weight affects the gradients."""
    for local_name, parameter in chunk.named_parameters():
        if parameter.dim() == 1 or not parameter.any():
            shape = full_shape(parameter)
            generator = torch.Generator().manual_seed(zlib.crc32(global_name(chunk, local_name).encode()))
            noise = torch.randn(shape, generator=generator)
            parameter.add_(0.02 * tensor_parallel_shard(noise, parameter).to(parameter.device))


def _judge_tensors(check: str, quantity: str, errors: ErrorsByName, *, allowed: float) -> Finding:
    smallest = SMALLEST_SHARE * math.sqrt(sum(sums.expected for sums in errors.values()))
    relative = {
        name: _relative(math.sqrt(sums.difference), max(math.sqrt(sums.expected), smallest))
        for name, sums in errors.items()
    }
    differing = [name for name, error in relative.items() if error > allowed]
    if differing:
        first = differing[0]
        return failure(
            check,
            f"{quantity} of {first}: relative error {relative[first]:.2g}, allowed {allowed:.2g}; "
            f"{len(differing)} of {len(relative)} parameters differ from those of one process",
            REMEDY,
        )
    largest = max(relative, key=lambda name: relative[name])
    return fine(
        check,
        f"{quantity} of {len(relative)} parameters as in one process; largest relative error "
        f"{relative[largest]:.2g} ({largest}), allowed {allowed:.2g}",
    )


def _judge_losses(losses: list[float], expected: list[float], *, allowed: float) -> Finding:
    errors = [_relative(abs(loss - other), abs(other)) for loss, other in zip(losses, expected, strict=True)]
    for step, error in enumerate(errors, 1):
        if error > allowed:
            return failure(
                "layout losses",
                f"step {step}: loss {losses[step - 1]:.7g}, in one process {expected[step - 1]:.7g}; "
                f"relative error {error:.2g}, allowed {allowed:.2g}",
                REMEDY,
            )
    return fine(
        "layout losses",
        f"{len(losses)} steps as in one process; largest relative error {max(errors):.2g}, "
        f"allowed {allowed:.2g}",
    )


def _relative(difference: float, expected: float) -> float:
    error = difference / expected if expected > 0 else difference
    return error if math.isfinite(error) else math.inf


def _square_sum(values: torch.Tensor) -> float:
    return float(values.square().sum())
