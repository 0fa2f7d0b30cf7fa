"""Compare complete optimizer steps of two runs: ratios of times and of FLOPs, and the utilization."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from sas_megatron.benchmarks.roofline import measure_ceilings
from sas_megatron.benchmarks.step_time import measure_step_seconds
from sas_megatron.benchmarks.timing import median_ratio
from sas_megatron.benchmarks.transformers_step import check_comparable
from sas_megatron.config.run import RunConfig
from sas_megatron.costs.flops import causal_half, count_training_flops
from sas_megatron.costs.parameters import count_parameters
from sas_megatron.model.assembly import DTYPES
from sas_megatron.planning.hardware_file import load_hardware, shipped_names


def with_microbatches(config: RunConfig, num_microbatches: int) -> RunConfig:
    """Return the run with `num_microbatches` microbatches per step on one model replica."""
    samples = num_microbatches * config.training.micro_batch_size
    training = config.training.model_copy(update={"global_batch_size": samples})
    return config.model_copy(update={"training": training})


def compare_steps(
    configs: dict[str, RunConfig], *, device: torch.device, rounds: int, with_transformers: bool = False
) -> dict[str, Any]:
    """Time two runs in alternation; the first one is the base.

    Args:
        configs: The two runs by name.
        device: The device of the runs.
        rounds: Number of rounds, in each of which every run is timed once.
        with_transformers: Whether to time the model of transformers with the base's parameters, too.

    Returns:
        For each name: seconds of a step, tokens, parameters, training FLOPs, and model FLOPs utilization
        (with all scores, and with their causal half). The ratios of the second run to the base in time, FLOPs
        and parameters, and the time ratio over the FLOPs ratio. With transformers, the seconds of its step,
        and its time divided by the base's.

    Raises:
        UserError: There is no such model, or it cannot be timed.
    """
    if with_transformers:
        check_comparable(next(iter(configs.values())))
    rounds_of_seconds = measure_step_seconds(
        list(configs.values()), rounds=rounds, with_transformers=with_transformers
    )
    seconds = {
        name: [measured[index] for measured in rounds_of_seconds] for index, name in enumerate(configs)
    }
    precision = next(iter(configs.values())).training.precision
    peak, origin = _peak_flops(device, precision)
    rows = {name: _row(config, seconds[name], peak) for name, config in configs.items()}
    base, other = configs
    flops_ratio = rows[other]["flops"] / rows[base]["flops"]
    time_ratio = median_ratio(seconds[other], seconds[base])
    comparison = {}
    if with_transformers:
        of_transformers = [measured[-1] for measured in rounds_of_seconds]
        comparison = {
            "transformers_seconds": statistics.median(of_transformers),
            "transformers_over_base": median_ratio(of_transformers, seconds[base]),
        }
    return {
        "rows": rows,
        **comparison,
        "time_ratio": time_ratio,
        "flops_ratio": flops_ratio,
        "time_over_flops": time_ratio / flops_ratio,
        "parameter_ratio": rows[other]["parameters"] / rows[base]["parameters"],
        "peak_flops_per_second": peak,
        "peak_is_of": origin,
        "rounds": rounds,
    }


def _row(config: RunConfig, seconds: list[float], peak: float) -> dict[str, float]:
    median = statistics.median(seconds)
    tokens = config.training.global_batch_size * config.data.sequence_length
    terms = count_training_flops(config)
    halved = causal_half(terms, sequence_length=config.data.sequence_length)
    ranks = config.parallel.model_size
    return {
        "seconds": median,
        "tokens": tokens,
        "parameters": sum(count_parameters(config).values()),
        "flops": tokens * sum(terms.values()),
        "flops_utilization": tokens * sum(terms.values()) / median / ranks / peak,
        "flops_utilization_causal": tokens * sum(halved.values()) / median / ranks / peak,
    }


def _peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Return the peak FLOP/s and its source.

    The peak is the data sheet's if there is a hardware file for the GPU, and otherwise the measured rate of a
    large matrix product.
    """
    if device.type == "cuda":
        model = torch.cuda.get_device_name(device).upper()
        for name in shipped_names():
            if name.upper() in model:
                hardware = load_hardware(name)
                return hardware.matrix_rate(precision), f"data sheet, {hardware.name}"
    ceilings = measure_ceilings(device, DTYPES[precision])
    return ceilings.matrix_flops_per_second, "measured, large matrix product"
