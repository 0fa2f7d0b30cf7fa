"""Time of the head and feature simulation, against the least time that its bytes and its FLOPs allow."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.simulation_kernels import (
    FusedKernels,
    HeadSource,
    PlainKernels,
    SimulationKernels,
    build_simulation,
    build_simulation_kernels,
)
from sas_megatron.benchmarks.attention_blocks import BlockShape
from sas_megatron.benchmarks.roofline import Ceilings, Point, measure_ceilings
from sas_megatron.benchmarks.timing import Preparation, median_ratio, time_alternately
from sas_megatron.costs.attention import build_attention_costs
from sas_megatron.platform.transformer_engine_fallbacks import apply_rope

PASSES = ("forward", "backward")


class SimulationCase:
    """The simulation of a layer on random projected columns: query, key and value, with rotary embeddings."""

    def __init__(self, shape: BlockShape, *, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        self.attention = shape.simulated()
        torch.manual_seed(1)
        simulation = build_simulation(self.attention, dtype=dtype, device=device)
        simulation.requires_grad_(True)
        for parameter in simulation.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weights = simulation.weights()
        self.columns = torch.randn(shape.num_tokens, self.attention.qkv_width, **options, requires_grad=True)
        self.leaves = [self.columns, *simulation.parameters()]
        self.angles = RotaryEmbedding(self.attention.rotary_width, 1.0)(shape.sequence_length)
        features = self.attention.query_key_dim
        self.gradients = [
            torch.randn(shape.num_tokens, self.attention.num_simulated_heads, width, **options)
            for width in (features, features, shape.head_dim)
        ]

    def run(self, kernels: SimulationKernels) -> list[torch.Tensor]:
        """Return query, key and value, [T, r·N, E or D], with rotary embeddings applied."""

        def all_heads(count: int) -> slice:
            return slice(0, count)

        results = kernels.heads(self.columns, self.weights, all_heads)
        rope = self.angles if kernels.applies_rope else None
        for index, name in enumerate(("query", "key")):
            source = HeadSource(self.columns, all_heads)
            results[index] = kernels.features(name, results[index], self.weights, rope=rope, source=source)
            if not kernels.applies_rope:
                sequences = results[index].unflatten(0, (self.shape.sequence_length, -1))
                results[index] = apply_rope(sequences, self.angles).flatten(0, 1)
        return results

    def passes(self, kernels: SimulationKernels) -> dict[str, Preparation]:
        """Return the actions to time: the forward pass and the backward pass."""

        def backward() -> Callable[[], object]:
            results = self.run(kernels)
            return lambda: torch.autograd.grad(results, self.leaves, self.gradients)

        return {"forward": lambda: lambda: self.run(kernels), "backward": backward}

    def least_work(self) -> dict[str, tuple[float, float]]:
        """Return the minimum bytes and FLOPs of each pass.

        Inputs are read once, outputs are written once, and nothing is recomputed.
        """
        attention, tokens = self.attention, self.shape.num_tokens
        output_width = attention.num_simulated_heads * (2 * attention.query_key_dim + attention.head_dim)
        terms = build_attention_costs(attention).count_forward_flops(
            self.shape.hidden_size, sequence_length=self.shape.sequence_length
        )
        flops = tokens * (terms["head_simulation"] + terms["feature_simulation"])
        element_bytes = self.columns.element_size()
        return {
            "forward": (element_bytes * tokens * (attention.qkv_width + output_width), flops),
            "backward": (element_bytes * tokens * (2 * attention.qkv_width + output_width), 2 * flops),
        }


def measure_simulation(
    shape: BlockShape, *, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Time the plain kernels and, on a GPU, the fused kernels in alternation, and measure the ceilings.

    Returns:
        Median seconds by kernels and pass; their ratio to the floor, the time of the least bytes and FLOPs at
        the measured ceilings; and the ratio of the plain to the fused time.
    """
    case = SimulationCase(shape, device=device, dtype=dtype)
    forms = usable_kernels(case.attention, device=device, dtype=dtype)
    preparations = {
        f"{form} {name}": prepare
        for form, kernels in forms.items()
        for name, prepare in case.passes(kernels).items()
    }
    seconds = time_alternately(preparations, device=device, rounds=repeats)
    ceilings = measure_ceilings(device, dtype)
    rows = {
        name: _row(statistics.median(times), case.least_work()[name.split()[1]], ceilings)
        for name, times in seconds.items()
    }
    ratios = {
        name: median_ratio(seconds[f"plain {name}"], seconds[f"fused {name}"]) if "fused" in forms else None
        for name in PASSES
    }
    return {
        "rows": rows,
        "plain_over_fused": ratios,
        "ceilings": dataclasses.asdict(ceilings),
        "repeats": repeats,
    }


def usable_kernels(
    attention: SimulatedAttentionConfig, *, device: torch.device, dtype: torch.dtype
) -> dict[str, SimulationKernels]:
    """Return the plain kernels and, on a GPU, the fused kernels."""
    forms: dict[str, SimulationKernels] = {"plain": PlainKernels(attention)}
    if device.type == "cuda":
        fused = attention.model_copy(update={"kernel": "fused"})
        forms["fused"] = build_simulation_kernels(fused, dtype=dtype)
        assert isinstance(forms["fused"], FusedKernels), "attention.kernel=fused chose other kernels"
    return forms


def roofline_points(result: dict[str, Any]) -> list[Point]:
    """Return the measured passes as points of the roofline plot."""
    return [
        Point(name, flops=row["flops"], num_bytes=row["bytes"], seconds=row["seconds"])
        for name, row in result["rows"].items()
    ]


def _row(seconds: float, least: tuple[float, float], ceilings: Ceilings) -> dict[str, float]:
    num_bytes, flops = least
    floor = ceilings.floor_seconds(num_bytes=num_bytes, flops=flops)
    return {
        "seconds": seconds,
        "floor_seconds": floor,
        "over_floor": seconds / floor,
        "bytes": num_bytes,
        "flops": flops,
    }
