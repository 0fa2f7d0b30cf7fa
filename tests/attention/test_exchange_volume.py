"""Bytes sent by one SAS layer in forward and backward, compared with the formulas of the operator.

The linear projections of the layer send as many bytes as those of multi-head attention. They are measured
separately and subtracted, which leaves the exchange of heads and the sum of the simulation's weight
gradients.
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
    """The sizes N, G, D, r, E of a case; `simulated` names the tensors with r times the heads."""

    N: int
    G: int
    D: int
    r: int
    E: int
    simulated: frozenset[str]

    @staticmethod
    def of_operator(operator: str) -> Letters:
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
        """Return (N+2G)·D, the columns of the projection per token."""
        return (self.N + 2 * self.G) * self.D

    def scattered_elements(self, ranks: int) -> int:
        """Return the elements of `scatter_heads` per token: r·(N+2G)·D if P divides G and all is simulated.

        Tensors that are not simulated have no factor r. If G < P, a block has P heads instead of G, because
        every rank gets a copy of the head that it shares.
        """
        heads = {"query": self.N, "key": max(self.G, ranks), "value": max(self.G, ranks)}
        return sum(
            count * self.D * (self.r if name in self.simulated else 1) for name, count in heads.items()
        )


def elements(operator: str, exchange: str, ranks: int) -> float:
    """Return the elements that a rank sends per token in forward; the number in backward is the same."""
    letters, columns = Letters.of_operator(operator), Letters.of_operator(operator).columns()
    if exchange == "gather":
        return (ranks - 1) / ranks * columns
    return (ranks - 1) / ranks**2 * (columns + letters.scattered_elements(ranks))


def _sent(case: LayerCase, tensor: int, length: int) -> tuple[dict[str, float], dict[str, float], int]:
    """Return a rank's bytes by operation in forward and backward, and the number of simulation parameters."""
    from sas_megatron.distributed.communication_counter import CommunicationCounter

    topology = in_layout(ParallelConfig(tensor=tensor, sequence=case.sequence_parallel))
    layer = layer_case.build_layer(case, tensor)
    num_local = length // tensor if case.sequence_parallel else length
    hidden = torch.randn(num_local, BATCH, layer_case.HIDDEN_SIZE, dtype=case.dtype, requires_grad=True)
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
    """Return by rank the bytes of the layer minus those of a multi-head layer's linear projections."""
    case = LayerCase.of(dtype=torch.float32, **layout, **attention)
    plain = {"kind": "mha", "num_heads": attention["num_heads"], "head_dim": attention["head_dim"]}
    plain_case = LayerCase.of(dtype=torch.float32, **layout, **plain), tensor, length
    if plain_case not in _sent_by_projections:
        _sent_by_projections[plain_case] = ranks(tensor).run(_sent, *plain_case)
    base = _sent_by_projections[plain_case]
    results = []
    for layer, projections in zip(ranks(tensor).run(_sent, case, tensor, length), base, strict=True):
        differences = [Counter(sent) for sent in layer[:2]]
        for difference, projection in zip(differences, projections[:2], strict=True):
            difference.subtract(projection)
        kept = [Counter({name: count for name, count in sent.items() if count}) for sent in differences]
        results.append((kept[0], kept[1], layer[2]))
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
def test_a_layer_sends_the_bytes_of_the_formulas(
    ranks: Any, operator: str, exchange: str, tensor: int, sequence: bool
) -> None:
    attention = {**OPERATORS[operator], "exchange": exchange}
    tokens = 8 * BATCH
    for forward, backward, parameters in measured(ranks, attention, tensor, sequence_parallel=sequence):
        one_way = elements(operator, exchange, tensor) * tokens * ELEMENT_BYTES
        weight_gradients = 2 * (tensor - 1) / tensor * parameters * 4
        in_forward, in_backward = COLLECTIVES[exchange]
        assert forward == pytest.approx({in_forward: one_way})
        assert backward == pytest.approx({in_backward: one_way, "allreduce": weight_gradients})


@pytest.mark.parametrize(("operator", "exchange", "tensor"), OPERATOR_CASES)
def test_the_estimate_for_choosing_an_exchange_equals_the_formula(
    operator: str, exchange: str, tensor: int
) -> None:
    costs = exchange_costs(SimulatedAttentionConfig(**OPERATORS[operator]), tensor_parallel=tensor)
    assert costs[exchange].sent_elements == pytest.approx(elements(operator, exchange, tensor))


def test_uneven_tokens_send_the_bytes_of_the_formula_on_average(ranks: Any) -> None:
    attention = {**OPERATORS["grouped"], "exchange": "all_to_all"}
    by_rank = measured(ranks, attention, 4, length=7)  # 21 tokens: 6, 5, 5 and 5
    sent = [forward["alltoall_base"] for forward, _, _ in by_rank]
    assert len(set(sent)) == 2
    assert sum(sent) / 4 == pytest.approx(elements("grouped", "all_to_all", 4) * 21 * ELEMENT_BYTES)


@pytest.mark.parametrize(("operator", "tensor"), [("multi-head", 2), ("multi-head", 4), ("grouped", 2)])
def test_simulating_features_after_the_exchange_sends_less_than_before_it(
    ranks: Any, operator: str, tensor: int
) -> None:
    letters = Letters.of_operator(operator)
    n, g, d, r, e = letters.N, letters.G, letters.D, letters.r, letters.E
    wide = (tensor - 1) / tensor**2 * (letters.columns() + r * (n + g) * e + r * g * d)
    attention = {**OPERATORS[operator], "exchange": "all_to_all"}
    for forward, _, _ in measured(ranks, attention, tensor):
        sent = forward["alltoall_base"] / (8 * BATCH * ELEMENT_BYTES)
        assert wide - sent == pytest.approx((tensor - 1) / tensor**2 * r * (n + g) * (e - d))
        assert sent < 0.85 * wide


def test_gather_sends_less_than_all_to_all_only_for_few_ranks(ranks: Any) -> None:
    letters = Letters.of_operator("multi-head")
    assert letters.r == 2  # both send the same at P = r + 1 = 3
    sent = {
        (tensor, exchange): sum(measured(ranks, {**sas(), "exchange": exchange}, tensor)[0][0].values())
        for tensor in (2, 4)
        for exchange in ("gather", "all_to_all")
    }
    assert sent[2, "gather"] < sent[2, "all_to_all"]
    assert sent[4, "gather"] > sent[4, "all_to_all"]
