"""How tensor ranks exchange heads for the simulation: two strategies, and the choice. No torch.

Every simulated head reads all base heads, while each rank projects only its local ones:

    gather      all-gather the projected columns; each rank simulates its own heads for all tokens, and
                repeats the first convolution, which is over all heads
    all_to_all  exchange "all tokens, local heads" for "local tokens, all heads"; simulate without repetition;
                exchange the simulated heads back

`distributed.head_exchange` implements both. `attention.exchange=auto` takes the one with less estimated time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.costs.tensor_traffic import TensorGroup, Traffic

logger = logging.getLogger(__name__)

# One H100 in bfloat16, from its data sheet: 989 TFLOP/s dense, of which small products are assumed to reach a
# third; 450 GB/s of NVLink in each direction, assumed 70 %; 3.35 TB/s of memory bandwidth, assumed 80 %.
# Only the ratios affect the choice.
MATRIX_FLOPS_PER_SECOND = 330e12
LINK_BYTES_PER_SECOND = 315e9
MEMORY_BYTES_PER_SECOND = 2.7e12
ELEMENT_BYTES = 2


@dataclass(frozen=True)
class ExchangeCost:
    """Forward cost of a strategy for one token on one rank, in addition to 1/P of the simulation.

    Attributes:
        sent_elements: Elements that the rank sends.
        repeated_flops: FLOPs of the first convolution that other ranks compute as well.
        repeated_elements: Elements that the rank writes and reads for heads that other ranks own.
    """

    sent_elements: float
    repeated_flops: float
    repeated_elements: float

    @property
    def seconds(self) -> float:
        """The estimated time to send, to compute, and to write and read."""
        return (
            self.sent_elements * ELEMENT_BYTES / LINK_BYTES_PER_SECOND
            + self.repeated_flops / MATRIX_FLOPS_PER_SECOND
            + 2 * self.repeated_elements * ELEMENT_BYTES / MEMORY_BYTES_PER_SECOND
        )


def exchange_traffic(attention: SimulatedAttentionConfig, strategy: str, group: TensorGroup) -> Traffic:
    """Return the bytes that a strategy sends for T tokens on P ranks, with W = D(N + 2G) projected columns.

    gather sends (P-1)/P·T·W elements, all_to_all (P-1)/P²·T·(W + W'), where W' is the width of the heads that
    are sent back: r·N·D + 2·r·G·D if all heads are simulated, without the factor r for other heads. If
    G < P, P takes the place of G, since each rank gets a copy of the key/value head that it shares.
    """
    if strategy == "gather":
        return group.all_gather(attention.qkv_width)
    simulated = attention.head_simulations()
    groups = attention.num_key_value_heads
    returned_heads = sum(
        max(heads, group.ranks) * (attention.head_expansion if name in simulated else 1)
        for name, heads in (("query", attention.num_heads), ("key", groups), ("value", groups))
    )
    return group.all_to_all(attention.qkv_width, return_width=returned_heads * attention.head_dim)


def exchange_costs(attention: SimulatedAttentionConfig, *, tensor_parallel: int) -> dict[str, ExchangeCost]:
    """Return the cost of each strategy on `tensor_parallel` ranks."""
    ranks, width = tensor_parallel, attention.head_dim
    simulations = attention.head_simulations()
    expanded = sum(attention.head_expansion * heads for heads in simulations.values()) * width
    first_convolution = sum(
        2 * attention.kernel_size * attention.head_expansion * heads * heads * width
        for heads in simulations.values()
    )
    remote = (ranks - 1) / ranks
    # As many tokens as ranks, so that each rank has the same number of tokens.
    group = TensorGroup(ranks=ranks, tokens=ranks, sequence=False, element_bytes=1)
    sent = {
        name: float(exchange_traffic(attention, name, group).forward / ranks)
        for name in ("gather", "all_to_all")
    }
    return {
        "gather": ExchangeCost(
            sent_elements=sent["gather"],
            repeated_flops=remote * first_convolution,
            repeated_elements=remote * (attention.qkv_width + expanded),
        ),
        "all_to_all": ExchangeCost(
            sent_elements=sent["all_to_all"], repeated_flops=0.0, repeated_elements=0.0
        ),
    }


def resolve_exchange(attention: SimulatedAttentionConfig, *, tensor_parallel: int) -> str:
    """Return the configured strategy, or the cheaper one for `auto`."""
    if attention.exchange != "auto":
        return attention.exchange
    return _select_cheaper(exchange_costs(attention, tensor_parallel=tensor_parallel))


def choose_exchange(attention: SimulatedAttentionConfig, *, tensor_parallel: int) -> str:
    """Return `resolve_exchange`, and log the estimated times if `auto` chose between them."""
    if attention.exchange != "auto":
        return attention.exchange
    costs = exchange_costs(attention, tensor_parallel=tensor_parallel)
    choice = _select_cheaper(costs)
    if tensor_parallel > 1:
        logger.info(
            "attention.exchange=auto: %s (estimated ns per token and layer: %s)",
            choice,
            ", ".join(f"{name} {cost.seconds * 1e9:.2f}" for name, cost in costs.items()),
        )
    return choice


def _select_cheaper(costs: dict[str, ExchangeCost]) -> str:
    return min(costs, key=lambda name: costs[name].seconds)
