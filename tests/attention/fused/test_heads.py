"""The fused head simulation has the results and gradients of plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sas_megatron.attention.sas.fused.features import Tile, Tiling
from sas_megatron.attention.sas.fused.heads import HeadColumns, HeadShard, simulate_heads
from sas_megatron.attention.sas.simulated_attention import simulate_heads as simulate_plain
from sas_megatron.costs.kernel_tiles import taps_at_once
from tests.attention.fused.simulation_case import (
    Draws,
    as_float64,
    assert_all_near,
    cases_in_dtypes,
    gradients_of,
    in_float64,
    leaves_of,
    poisoned_memory,
    saved_addresses,
)

# Small tiles of four tokens with up to 16 features: 15 tokens are more tiles than programs, and their last
# tile is partly filled, as it is with seven tokens.
TILING = Tiling(head_forward=Tile(rows=64), head_backward=Tile(rows=64), head_refine_gradient=Tile(rows=64))


@dataclass(frozen=True)
class Case:
    """Sizes of the heads of query, key and value, in Megatron-core's order of columns."""

    num_heads: int = 3
    num_groups: int = 3
    expansion: int = 2
    head_dim: int = 6
    kernel_size: int = 3
    bias: bool = True
    tokens: int = 15
    ranks: int = 1  # the last rank is tested
    simulated: tuple[bool, bool, bool] = (True, True, True)

    def shards(self, draws: Draws) -> list[HeadShard]:
        """Return query, key and value."""
        queries = self.num_heads // self.num_groups
        stride = (queries + 2) * self.head_dim
        gather_columns = [
            HeadColumns(0, self.num_heads, queries, stride, self.head_dim),
            HeadColumns(queries * self.head_dim, self.num_groups, 1, stride, self.head_dim),
            HeadColumns((queries + 1) * self.head_dim, self.num_groups, 1, stride, self.head_dim),
        ]
        shards = []
        for columns, simulated in zip(gather_columns, self.simulated, strict=True):
            base, many = columns.num_heads, columns.num_heads * self.expansion
            weights = draws.map_weights(
                (many, base, self.kernel_size), (many, many, self.kernel_size), bias=self.bias
            )
            base_heads = slice(base - base // self.ranks, base)
            shards.append(HeadShard(columns, weights if simulated else None, base_heads))
        return shards

    @property
    def num_columns(self) -> int:
        """(N+2G)·D."""
        return (self.num_heads + 2 * self.num_groups) * self.head_dim


CASES = {
    "plain": Case(),
    "one tap": Case(kernel_size=1),
    "five taps": Case(kernel_size=5, head_dim=7, tokens=7),
    "as wide as a tile": Case(head_dim=16, tokens=7),
    "wider than a tile's rows": Case(head_dim=72, tokens=5),
    "no biases": Case(bias=False, tokens=7),
    "no expansion": Case(expansion=1),
    "grouped": Case(num_heads=6, num_groups=2, tokens=7),
    "multi-query": Case(num_heads=5, num_groups=1, expansion=3),
    "seventeen heads": Case(num_heads=17, num_groups=17, expansion=1, tokens=5),
    "local heads of a rank": Case(num_heads=4, num_groups=4, expansion=3, ranks=2),
    "local heads of grouped": Case(num_heads=8, num_groups=4, ranks=4, bias=False, tokens=7),
    "no query heads": Case(simulated=(False, True, True), tokens=7),
    "only local value heads": Case(num_heads=4, num_groups=2, ranks=2, simulated=(False, False, True)),
    "fewer tokens than a tile": Case(tokens=1),
}


def plain(columns: torch.Tensor, shards: list[HeadShard]) -> list[torch.Tensor]:
    results = []
    for shard in shards:
        heads = shard.columns.view(columns).flatten(1, 2)
        if shard.weights is None:
            results.append(heads[:, shard.base_heads])
        else:
            results.append(simulate_plain(heads, shard.weights, base_heads=shard.base_heads))
    return results


# The default run covers each branch of the kernels once; no branch depends on the dtype.
@cases_in_dtypes(
    CASES,
    float32=(
        "five taps",
        "wider than a tile's rows",
        "grouped",
        "seventeen heads",
        "local heads of a rank",
        "no query heads",
        "fewer tokens than a tile",
    ),
    bfloat16=(
        "one tap",
        "as wide as a tile",
        "no biases",
        "multi-query",
        "local heads of grouped",
        "only local value heads",
    ),
)
def test_results_and_gradients_equal_those_of_the_plain_simulation(name: str, dtype: torch.dtype) -> None:
    case, draws = CASES[name], Draws(len(name), dtype)
    columns, shards = draws.tensor(case.tokens, case.num_columns, scale=1.0), case.shards(draws)
    leaves = [columns, *leaves_of(*(shard.weights for shard in shards))]
    with poisoned_memory():
        actual = gradients_of(lambda: simulate_heads(columns, shards, tiling=TILING), leaves)
    wide_columns = as_float64(columns)
    wide_shards = [shard._replace(weights=in_float64(shard.weights)) for shard in shards]
    wide_leaves = [wide_columns, *leaves_of(*(shard.weights for shard in wide_shards))]
    assert_all_near(actual, gradients_of(lambda: plain(wide_columns, wide_shards), wide_leaves), dtype)


def test_sums_that_do_not_fit_are_accumulated_tap_by_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    case, draws = Case(simulated=(False, False, True)), Draws(3, torch.float32)
    columns, shards = draws.tensor(case.tokens, case.num_columns), case.shards(draws)
    leaves = [columns, *leaves_of(*(shard.weights for shard in shards))]
    sizes = {"num_outputs": case.num_heads * case.expansion, "num_inputs": case.num_heads * case.expansion}
    assert taps_at_once(case.kernel_size, **sizes) == case.kernel_size
    at_once = gradients_of(lambda: simulate_heads(columns, shards, tiling=TILING), leaves)
    monkeypatch.setattr("sas_megatron.costs.kernel_tiles.LARGEST_SUM_BYTES", 0)
    assert taps_at_once(case.kernel_size, **sizes) == 1
    with poisoned_memory():
        tap_by_tap = gradients_of(lambda: simulate_heads(columns, shards, tiling=TILING), leaves)
    for one, other in zip(at_once[1], tap_by_tap[1], strict=True):
        assert torch.equal(one, other)


def test_equal_inputs_give_bit_identical_results_and_others_do_not() -> None:
    case = Case(kernel_size=1)
    runs = []
    for seed in (1, 1, 2):
        draws = Draws(seed, torch.bfloat16)
        columns, shards = draws.tensor(case.tokens, case.num_columns), case.shards(draws)
        leaves = [columns, *leaves_of(*(shard.weights for shard in shards))]
        results, gradients = gradients_of(lambda: simulate_heads(columns, shards, tiling=TILING), leaves)  # noqa: B023
        runs.append((results, gradients))
    (results, gradients), (repeated, repeated_gradients), (others, _) = runs
    for first, second in zip([*results, *gradients], [*repeated, *repeated_gradients], strict=True):
        assert torch.equal(first, second)
    for first, other in zip(results, others, strict=True):
        assert not torch.equal(first, other)


def test_only_columns_and_weights_are_saved() -> None:
    case, draws = Case(), Draws(5, torch.float32)
    columns, shards = draws.tensor(case.tokens, case.num_columns), case.shards(draws)
    known = {leaf.data_ptr() for leaf in (columns, *leaves_of(*(shard.weights for shard in shards)))}
    with saved_addresses() as saved:
        simulate_heads(columns, shards, tiling=TILING)
    assert saved == known
