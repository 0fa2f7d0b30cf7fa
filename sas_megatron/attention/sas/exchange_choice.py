"""`attention.exchange=auto`: which way of exchanging heads should take less time, and why."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.config.tensor_group import TensorGroup

logger = logging.getLogger(__name__)

# One H100 in bfloat16, of the data sheet: 989 TFLOP/s dense at an assumed third for these small
# products; 450 GB/s of NVLink each way at an assumed 70 %; 3.35 TB/s of memory at an assumed 80 %.
# Only their proportions matter to the choice.
MATRIX_FLOPS_PER_SECOND = 330e12
WIRE_BYTES_PER_SECOND = 315e9
MEMORY_BYTES_PER_SECOND = 2.7e12
ELEMENT_BYTES = 2


@dataclass(frozen=True)
class ExchangeCost:
    """Forward cost of a strategy for one token on one rank, beyond a P-th of the simulation."""

    wire_elements: float
    repeated_flops: float
    repeated_elements: float

    @property
    def seconds(self) -> float:
        """The three terms in time: sending, computing again, and writing and reading what is held again."""
        return (
            self.wire_elements * ELEMENT_BYTES / WIRE_BYTES_PER_SECOND
            + self.repeated_flops / MATRIX_FLOPS_PER_SECOND
            + 2 * self.repeated_elements * ELEMENT_BYTES / MEMORY_BYTES_PER_SECOND
        )


def exchange_costs(attention: SimulatedAttentionConfig, *, tensor_parallel: int) -> dict[str, ExchangeCost]:
    """The cost of each strategy at P = `tensor_parallel` ranks."""
    ranks, width = tensor_parallel, attention.head_dim
    simulations = attention.head_simulations()
    columns = attention.qkv_width
    expanded = sum(attention.head_expansion * heads for heads in simulations.values()) * width
    first_convolution = sum(
        2 * attention.kernel_size * attention.head_expansion * heads * heads * width
        for heads in simulations.values()
    )
    elsewhere = (ranks - 1) / ranks
    # As many tokens as ranks, so that each has the same part of them.
    group = TensorGroup(ranks=ranks, tokens=ranks, sequence=False, element_bytes=1)
    sent = {
        name: attention.exchange_traffic(name, group).forward / ranks for name in ("gather", "all_to_all")
    }
    return {
        "gather": ExchangeCost(
            wire_elements=float(sent["gather"]),
            repeated_flops=elsewhere * first_convolution,
            repeated_elements=elsewhere * (columns + expanded),
        ),
        "all_to_all": ExchangeCost(
            wire_elements=float(sent["all_to_all"]), repeated_flops=0.0, repeated_elements=0.0
        ),
    }


def exchange_of(attention: SimulatedAttentionConfig, *, tensor_parallel: int) -> str:
    """The configured strategy, or the cheaper one under `auto`."""
    if attention.exchange != "auto":
        return attention.exchange
    return _cheaper(exchange_costs(attention, tensor_parallel=tensor_parallel))


def choose_exchange(attention: SimulatedAttentionConfig, *, tensor_parallel: int) -> str:
    """`exchange_of`, and where `auto` chose it, a line in the log with the sums."""
    if attention.exchange != "auto":
        return attention.exchange
    costs = exchange_costs(attention, tensor_parallel=tensor_parallel)
    choice = _cheaper(costs)
    if tensor_parallel > 1:
        logger.info(
            "attention.exchange=auto: %s (estimated ns a token and layer: %s)",
            choice,
            ", ".join(f"{name} {cost.seconds * 1e9:.2f}" for name, cost in costs.items()),
        )
    return choice


def _cheaper(costs: dict[str, ExchangeCost]) -> str:
    return min(costs, key=lambda name: costs[name].seconds)
