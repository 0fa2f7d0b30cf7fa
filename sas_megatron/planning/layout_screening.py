"""Which layouts are worth a simulation: the legal ones, and a rough cost of each from counts alone.

The rough cost ranks, it is never shown: the time that one device would compute for, shared out, with the
pipeline's bubble and what is computed again, and the large messages of each group over its wire.
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

# Of forward and backward: a second forward pass, and that of the attention's core.
RECOMPUTED_SHARE = {"none": 0.0, "selective": 0.08, "full": 1 / 3}
VIRTUAL_PIPELINES = (1, 2, 4)


@dataclass(frozen=True)
class AloneCost:
    """Forward and backward on one device that holds the whole model, whether there is one or not."""

    seconds_per_token: float
    operations_per_microbatch: float


def legal_layouts(config: RunConfig, *, world_size: int, hardware: Hardware) -> Iterator[RunConfig]:
    """Every combination of degrees that the config's rules allow; small micro batches before large ones.

    Sequence parallelism goes with tensor parallelism, and the distributed optimizer with data
    parallelism: each sends the same bytes and holds less. Tensor groups stay within a node, stages
    are even, and `training.recompute` takes its defaults.
    """
    degrees = divisors(world_size)
    axes: dict[str, list[Any]] = {
        "parallel.tensor": [degree for degree in degrees if degree <= hardware.devices_per_node],
        "parallel.context": degrees,
        "parallel.pipeline": [degree for degree in degrees if degree <= config.model.num_layers],
        "parallel.virtual_pipeline": list(VIRTUAL_PIPELINES),
        "training.recompute": list(RECOMPUTED_SHARE),
        "training.micro_batch_size": divisors(config.training.global_batch_size),
    }
    for place in itertools.product(*axes.values()):
        chosen = dict(zip(axes, place, strict=True))
        if not _may_be_legal(config, chosen, world_size):
            continue
        try:
            candidate = with_layout(config, chosen, world_size=world_size)
            candidate.check_world_size(world_size)
        except UserError:
            continue
        yield candidate


def _may_be_legal(config: RunConfig, chosen: dict[str, Any], world_size: int) -> bool:
    """What rules most combinations out, before a config is built for them."""
    ranks = chosen["parallel.tensor"] * chosen["parallel.context"] * chosen["parallel.pipeline"]
    if world_size % ranks:
        return False
    data_parallel: int = world_size // ranks
    samples: int = data_parallel * chosen["training.micro_batch_size"]
    return config.training.global_batch_size % samples == 0


def with_layout(config: RunConfig, chosen: dict[str, Any], *, world_size: int) -> RunConfig:
    """The config at the degrees chosen, with what follows; raises `UserError` as the config does."""
    degrees = ("tensor", "context", "pipeline")
    tensor, context, pipeline = (
        chosen.get(f"parallel.{name}", getattr(config.parallel, name)) for name in degrees
    )
    shares_data = world_size > tensor * context * pipeline
    changes = {
        "parallel.first_stage_layers": None,
        "parallel.last_stage_layers": None,
        "parallel.sequence": tensor > 1,
        "training.recompute_modules": None,
        "training.recompute_layers": None,
        "optimizer.distributed": shares_data,
    }
    if not shares_data:
        changes |= {"parallel.overlap_gradient_reduce": False, "parallel.overlap_parameter_gather": False}
    return config.replaced(changes | chosen)


def weights_fit(config: RunConfig, hardware: Hardware) -> bool:
    """Whether parameters and float32 gradients alone fit, evenly shared; the rest is simulated."""
    per_parameter = config.training.element_bytes + 4
    return hardware.fits(_parameters_of_rank(config) * per_parameter)


def rough_seconds(config: RunConfig, *, alone: AloneCost, world_size: int, hardware: Hardware) -> float:
    """The rough cost of a step, in seconds that are only good to compare.

    Args:
        config: a layout.
        alone: what it is shared out of.
        world_size: devices.
        hardware: their figures.
    """
    parallel, training = config.parallel, config.training
    data_parallel = world_size // parallel.model_size
    tokens = training.global_batch_size * config.data.sequence_length
    microbatches = training.num_microbatches(data_parallel)
    bubble = (parallel.pipeline - 1) / parallel.virtual_pipeline / microbatches
    again = 1 + RECOMPUTED_SHARE[training.recompute]
    layers = config.model.num_layers / parallel.pipeline
    operations = alone.operations_per_microbatch * microbatches / parallel.pipeline
    starting = 1e-6 * hardware.operation_microseconds * operations
    seconds = max(alone.seconds_per_token * tokens / world_size, starting) * again

    # Large messages alone, not by `costs.communication`: its count takes eight times as long (2.4 s for 4,500
    # layouts), and comes so near to the simulated time that runners-up would be left out of the ranking.
    element_bytes = training.element_bytes
    hidden = tokens / data_parallel / parallel.context * config.model.hidden_size * element_bytes
    # Two blocks a layer, into and out of each, forward and twice backward as far as weights' inputs go.
    seconds += _seconds_over(parallel.tensor, 8 * again * layers * hidden, 1, hardware)
    heads = hidden * config.attention.num_attended_heads * config.attention.query_key_dim
    traded = heads / config.model.hidden_size / parallel.tensor
    # Query, key, value and the result, forward and backward.
    seconds += _seconds_over(parallel.context, 8 * again * layers * traded, parallel.tensor, hardware)
    inner = parallel.tensor * parallel.context
    update = _parameters_of_rank(config) * (4 + element_bytes)
    return seconds * (1 + bubble) + _seconds_over(data_parallel, update, inner, hardware)


def _seconds_over(ranks: int, num_bytes: float, stride: int, hardware: Hardware) -> float:
    """`num_bytes` passed round `ranks` ranks that stand `stride` apart."""
    if ranks == 1:
        return 0.0
    wire = hardware.wire_between([0, (ranks - 1) * stride])
    return (ranks - 1) / ranks * num_bytes / (1e9 * wire.gigabytes_per_second * hardware.attainable.wire)


def _parameters_of_rank(config: RunConfig) -> float:
    parallel: ParallelConfig = config.parallel
    return sum(count_parameters(config).values()) / parallel.tensor / parallel.pipeline
