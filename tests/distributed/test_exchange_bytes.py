"""What one SAS layer sends, forward and backward, against formulas in the operator's letters.

The layer's own linear projections send what those of multi-head attention do; measured alone and
subtracted, the rest is the exchange of heads and the sum of the simulation's weight gradients.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.tensor_parallel import exchange_costs
from sas_megatron.config.parallel import ParallelConfig
from tests.attention import layer_case
from tests.attention.layer_case import LayerCase
from tests.rank_pool import in_layout
from tests.selection import exhaustive

ELEMENT_BYTES = 4
BATCH = layer_case.BATCH


def sas(**fields: Any) -> dict[str, Any]:
    return {
        "kind": "sas",
        "num_heads": 4,
        "head_dim": 6,
        "head_expansion": 2,
        "simulated_head_dim": 10,
        **fields,
    }


OPERATORS: dict[str, dict[str, Any]] = {
    "multi-head": sas(),
    "three blocks": sas(head_expansion=3, kernel_size=1, simulation_bias=False),
    "grouped": sas(num_kv_heads=2),
    "multi-query": sas(num_kv_heads=1),
    "wide grouped": sas(num_heads=8, num_kv_heads=4, head_dim=2, simulated_head_dim=4),
    "no key heads": sas(
        num_kv_heads=2, simulate_key_heads=False, simulate_features=False, simulated_head_dim=6
    ),
}


@dataclass(frozen=True)
class Letters:
    """N, G, D, r, E of a case; `simulated` says which of query, key and value have r times the heads."""

    N: int
    G: int
    D: int
    r: int
    E: int
    simulated: frozenset[str]

    @staticmethod
    def of(operator: str) -> Letters:
        fields = OPERATORS[operator]
        config = SimulatedAttentionConfig(**fields)
        return Letters(
            fields["num_heads"],
            fields.get("num_kv_heads", fields["num_heads"]),
            fields["head_dim"],
            fields["head_expansion"],
            fields["simulated_head_dim"],
            frozenset(config.head_simulations()),
        )

    def columns(self) -> int:
        """(N+2G)·D, what the projection makes of a token."""
        return (self.N + 2 * self.G) * self.D

    def sent_home(self, ranks: int) -> int:
        """r·(N+2G)·D where all heads are simulated and P divides G.

        Without the factor r for what is not simulated; P in place of G heads a block where G < P, for
        every rank gets a copy of the head it shares.
        """
        heads = {"query": self.N, "key": max(self.G, ranks), "value": max(self.G, ranks)}
        return sum(
            count * self.D * (self.r if name in self.simulated else 1) for name, count in heads.items()
        )


def elements(operator: str, exchange: str, ranks: int) -> float:
    """Elements that a rank sends for a token, forward; backward the same."""
    letters, columns = Letters.of(operator), Letters.of(operator).columns()
    if exchange == "gather":
        return (ranks - 1) / ranks * columns
    return (ranks - 1) / ranks**2 * (columns + letters.sent_home(ranks))


def _sent(case: LayerCase, tensor: int, length: int) -> tuple[dict[str, float], dict[str, float], int]:
    """On a rank: bytes by operation, forward and backward, and the simulation's parameters."""
    from sas_megatron.distributed.communication_counter import CommunicationCounter

    topology = in_layout(ParallelConfig(tensor=tensor, sequence=case.sequence_parallel))
    layer = layer_case.build_layer(case, tensor)
    mine = length // tensor if case.sequence_parallel else length
    hidden = torch.randn(mine, BATCH, layer_case.HIDDEN_SIZE, dtype=case.dtype, requires_grad=True)
    angles = layer_case.rotary_angles(case.config())[:length]
    forward, backward = (CommunicationCounter({"tensor": topology.tensor_group}) for _ in range(2))
    with forward:
        output, _ = layer(hidden, None, rotary_pos_emb=angles)
    with backward:
        output.sum().backward()
    simulation = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("simulation."))
    return dict(forward.bytes_sent["tensor"]), dict(backward.bytes_sent["tensor"]), simulation


_sent_by_projections: dict[tuple[LayerCase, int, int], list[Any]] = {}


def measured(
    ranks: Any, attention: dict[str, Any], tensor: int, *, length: int = 8, **layout: Any
) -> list[tuple[Counter[str], Counter[str], int]]:
    """By rank: bytes of the layer beyond those of a multi-head layer's linear projections."""
    case = LayerCase.of(dtype=torch.float32, **layout, **attention)
    plain = {"kind": "mha", "num_heads": attention["num_heads"], "head_dim": attention["head_dim"]}
    of_plain = LayerCase.of(dtype=torch.float32, **layout, **plain), tensor, length
    if of_plain not in _sent_by_projections:
        _sent_by_projections[of_plain] = ranks(tensor).run(_sent, *of_plain)
    base = _sent_by_projections[of_plain]
    results = []
    for whole, linears in zip(ranks(tensor).run(_sent, case, tensor, length), base, strict=True):
        beyond = [Counter(sent) for sent in whole[:2]]
        for sent, of_linears in zip(beyond, linears[:2], strict=True):
            sent.subtract(of_linears)
        kept = [Counter({name: count for name, count in sent.items() if count}) for sent in beyond]
        results.append((kept[0], kept[1], whole[2]))
    return results


OPERATOR_CASES = list(itertools.product(OPERATORS, ("gather", "all_to_all"), (2, 4)))
COLLECTIVES = {"gather": ("allgather_base", "reduce_scatter_base"), "all_to_all": ("alltoall_base",) * 2}


SEQUENCE_PARALLEL = [
    pytest.param(
        *case,
        True,
        id="-".join(map(str, (*case, "sequence"))),
        marks=() if case in (("multi-query", "gather", 4), ("grouped", "all_to_all", 2)) else exhaustive,
    )
    for case in OPERATOR_CASES
]


@pytest.mark.parametrize(
    ("operator", "exchange", "tensor", "sequence"),
    [pytest.param(*case, False, id="-".join(map(str, case))) for case in OPERATOR_CASES] + SEQUENCE_PARALLEL,
)
def test_a_layer_sends_what_the_formulas_say(
    ranks: Any, operator: str, exchange: str, tensor: int, sequence: bool
) -> None:
    attention = {**OPERATORS[operator], "exchange": exchange}
    tokens = 8 * BATCH
    for forward, backward, parameters in measured(ranks, attention, tensor, sequence_parallel=sequence):
        one_way = elements(operator, exchange, tensor) * tokens * ELEMENT_BYTES
        weight_gradients = 2 * (tensor - 1) / tensor * parameters * 4
        of_forward, of_backward = COLLECTIVES[exchange]
        assert forward == pytest.approx({of_forward: one_way})
        assert backward == pytest.approx({of_backward: one_way, "allreduce": weight_gradients})


@pytest.mark.parametrize(("operator", "exchange", "tensor"), OPERATOR_CASES)
def test_the_estimate_behind_the_choice_counts_what_is_sent(
    operator: str, exchange: str, tensor: int
) -> None:
    costs = exchange_costs(SimulatedAttentionConfig(**OPERATORS[operator]), tensor_parallel=tensor)
    assert costs[exchange].sent_elements == pytest.approx(elements(operator, exchange, tensor))


def test_uneven_tokens_send_the_formula_on_average(ranks: Any) -> None:
    attention = {**OPERATORS["grouped"], "exchange": "all_to_all"}
    by_rank = measured(ranks, attention, 4, length=7)  # 21 tokens: 6, 5, 5 and 5
    sent = [forward["alltoall_base"] for forward, _, _ in by_rank]
    assert len(set(sent)) == 2
    assert sum(sent) / 4 == pytest.approx(elements("grouped", "all_to_all", 4) * 21 * ELEMENT_BYTES)


@pytest.mark.parametrize(("operator", "tensor"), [("multi-head", 2), ("multi-head", 4), ("grouped", 2)])
def test_simulating_features_at_home_sends_less_than_sending_wide_heads(
    ranks: Any, operator: str, tensor: int
) -> None:
    letters = Letters.of(operator)
    n, g, d, r, e = letters.N, letters.G, letters.D, letters.r, letters.E
    wide = (tensor - 1) / tensor**2 * (letters.columns() + r * (n + g) * e + r * g * d)
    attention = {**OPERATORS[operator], "exchange": "all_to_all"}
    for forward, _, _ in measured(ranks, attention, tensor):
        sent = forward["alltoall_base"] / (8 * BATCH * ELEMENT_BYTES)
        assert wide - sent == pytest.approx((tensor - 1) / tensor**2 * r * (n + g) * (e - d))
        assert sent < 0.85 * wide


def test_gathering_sends_less_only_up_to_as_many_ranks_as_copies_and_one(ranks: Any) -> None:
    letters = Letters.of("multi-head")
    assert letters.r == 2  # so the two are even at P = 3
    sent = {
        (tensor, exchange): sum(measured(ranks, {**sas(), "exchange": exchange}, tensor)[0][0].values())
        for tensor in (2, 4)
        for exchange in ("gather", "all_to_all")
    }
    assert sent[2, "gather"] < sent[2, "all_to_all"]
    assert sent[4, "gather"] > sent[4, "all_to_all"]
