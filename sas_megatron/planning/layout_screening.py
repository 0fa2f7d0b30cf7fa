"""Enumerate the legal layouts of a run, and rank them by a rough cost before they are estimated.

The rough cost is never shown. It is the compute time of the run on one device divided among the ranks,
with the pipeline bubble and the recomputation, plus the time of the large messages of each group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sas_megatron.config.errors import UserError
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from sas_megatron.config.section import divisors
from sas_megatron.costs.parameters import count_parameters
from sas_megatron.planning.hardware_file import Hardware

# Recomputed share of the forward and backward time: all of the forward pass, or that of the core attention.
RECOMPUTED_SHARE = {"none": 0.0, "selective": 0.08, "full": 1 / 3}
VIRTUAL_PIPELINES = (1, 2, 4)


@dataclass(frozen=True)
class SingleDeviceCost:
    """Cost of forward and backward on one device with the full model, whether or not it fits there."""

    seconds_per_token: float
    operations_per_microbatch: float


def legal_layouts(config: RunConfig, *, world_size: int, hardware: Hardware) -> Iterator[RunConfig]:
    """Yield every combination of degrees that the config's rules allow, small micro batches first.

    Tensor parallelism implies sequence parallelism, and data parallelism implies the distributed
    optimizer: both send the same number of bytes and need less memory. Tensor groups stay within a node,
    all stages have equally many layers, and the options of `training.recompute` have their defaults.
    """
    degrees = divisors(world_size, limit=world_size)
    axes: dict[str, list[Any]] = {
        "parallel.tensor": [degree for degree in degrees if degree <= hardware.devices_per_node],
        "parallel.context": degrees,
        "parallel.pipeline": [degree for degree in degrees if degree <= config.model.num_layers],
        "parallel.virtual_pipeline": list(VIRTUAL_PIPELINES),
        "training.recompute": list(RECOMPUTED_SHARE),
        "training.micro_batch_size": divisors(
            config.training.global_batch_size, limit=config.training.global_batch_size
        ),
    }
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        if not _may_be_legal(config, chosen, world_size):
            continue
        try:
            candidate = with_layout(config, chosen, world_size=world_size)
            candidate.check_world_size(world_size)
        except UserError:
            continue
        yield candidate


def _may_be_legal(config: RunConfig, chosen: dict[str, Any], world_size: int) -> bool:
    """Check two rules that exclude most combinations, before a config is built for them."""
    ranks = chosen["parallel.tensor"] * chosen["parallel.context"] * chosen["parallel.pipeline"]
    if world_size % ranks:
        return False
    data_parallel: int = world_size // ranks
    samples: int = data_parallel * chosen["training.micro_batch_size"]
    return config.training.global_batch_size % samples == 0


def with_layout(config: RunConfig, chosen: dict[str, Any], *, world_size: int) -> RunConfig:
    """Return the config with the chosen fields, and with the fields that follow from them.

    Args:
        config: The run.
        chosen: Values by dotted field name; the other degrees stay as they are in `config`.
        world_size: Number of ranks.

    Raises:
        UserError: The layout breaks a rule of the config.
    """
    degrees = ("tensor", "context", "pipeline")
    tensor, context, pipeline = (
        chosen.get(f"parallel.{name}", getattr(config.parallel, name)) for name in degrees
    )
    is_data_parallel = world_size > tensor * context * pipeline
    changes = {
        "parallel.first_stage_layers": None,
        "parallel.last_stage_layers": None,
        "parallel.sequence": tensor > 1,
        "training.recompute_modules": None,
        "training.recompute_layers": None,
        "optimizer.distributed": is_data_parallel,
    }
    if not is_data_parallel:
        changes |= {"parallel.overlap_gradient_reduce": False, "parallel.overlap_parameter_gather": False}
    return config.replaced(changes | chosen)


def weights_fit(config: RunConfig, hardware: Hardware) -> bool:
    """Return whether the evenly sharded parameters and their float32 gradients fit into memory.

    This is a lower bound of the memory; the estimate counts the rest.
    """
    per_parameter = config.training.element_bytes + 4
    return hardware.fits(_parameters_per_rank(config) * per_parameter)


def rough_seconds(
    config: RunConfig, *, single_device: SingleDeviceCost, world_size: int, hardware: Hardware
) -> float:
    """Return the rough cost of a step, in seconds that are only good for comparing layouts.

    Args:
        config: The run in one layout.
        single_device: Cost of the run on one device.
        world_size: Number of devices.
        hardware: Figures of the devices.
    """
    parallel, training = config.parallel, config.training
    data_parallel = world_size // parallel.model_size
    tokens = training.global_batch_size * config.data.sequence_length
    microbatches = training.num_microbatches(data_parallel)
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline / microbatches
    recompute_factor = 1 + RECOMPUTED_SHARE[training.recompute]
    layers = config.model.num_layers / parallel.pipeline
    operations = single_device.operations_per_microbatch * microbatches / parallel.pipeline
    launch_seconds = 1e-6 * hardware.operation_microseconds * operations
    compute_seconds = single_device.seconds_per_token * tokens / world_size
    seconds = max(compute_seconds, launch_seconds) * recompute_factor

    # Only the large messages are counted here. `costs.communication` takes eight times as long (2.4 s for
    # 4,500 layouts). It is also so close to the estimated time that the search would stop before it has
    # estimated the runners-up.
    element_bytes = training.element_bytes
    hidden_bytes = tokens / data_parallel / parallel.context * config.model.hidden_size * element_bytes
    # Tensor parallelism: a message before and after each of the two blocks of a layer, forward and backward.
    # The inputs that sequence parallelism gathers again for the gradients of the weights are left out.
    messages = 8 * recompute_factor * layers
    seconds += _transfer_seconds(parallel.tensor, messages * hidden_bytes, stride=1, hardware=hardware)
    head_bytes = hidden_bytes * config.attention.num_attended_heads * config.attention.query_key_dim
    exchanged = head_bytes / config.model.hidden_size / parallel.tensor
    # Context parallelism: query, key, value and the attention output, forward and backward.
    seconds += _transfer_seconds(
        parallel.context, messages * exchanged, stride=parallel.tensor, hardware=hardware
    )
    inner_ranks = parallel.tensor * parallel.context
    update_bytes = _parameters_per_rank(config) * (4 + element_bytes)
    data_seconds = _transfer_seconds(data_parallel, update_bytes, stride=inner_ranks, hardware=hardware)
    return seconds * (1 + bubble) + data_seconds


def _transfer_seconds(ranks: int, num_bytes: float, *, stride: int, hardware: Hardware) -> float:
    """Return the seconds of a ring exchange of `num_bytes` between `ranks` ranks, each `stride` apart."""
    if ranks == 1:
        return 0.0
    link = hardware.link_between([0, (ranks - 1) * stride])
    return (ranks - 1) / ranks * num_bytes / (1e9 * link.gigabytes_per_second * hardware.attainable.link)


def _parameters_per_rank(config: RunConfig) -> float:
    parallel: ParallelConfig = config.parallel
    return sum(count_parameters(config).values()) / parallel.tensor / parallel.pipeline
