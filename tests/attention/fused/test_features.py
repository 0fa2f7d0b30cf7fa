"""The fused feature simulation has the results and gradients of plain torch with rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sas_megatron.attention.sas.fused.features import (
    Recomputation,
    Tile,
    Tiling,
    build_rope_table,
    pair_order,
    simulate_features,
)
from sas_megatron.attention.sas.simulated_attention import simulate_features as simulate_plain
from sas_megatron.platform.transformer_engine_fallbacks import apply_rope
from tests.attention.fused.simulation_case import (
    DEVICE,
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

TILING = Tiling(
    feature_forward=Tile(rows=16),
    feature_backward=Tile(rows=16),
    feature_expand_gradient=Tile(rows=16, stages=2),
    feature_refine_gradient=Tile(rows=16),
)


@dataclass(frozen=True)
class Case:
    """Heads of S positions in B sequences."""

    length: int = 6
    batch: int = 2
    heads: int = 5
    narrow: int = 6
    wide: int = 10
    rotary: int = 10
    bias: bool = True

    def angles(self) -> torch.Tensor:
        """Return rotary angles in Megatron-core's shape [S, 1, 1, R]."""
        positions = torch.arange(self.length, dtype=torch.float32, device=DEVICE)
        half = positions[:, None] * 0.9 ** torch.arange(self.rotary // 2, device=DEVICE)
        return torch.cat([half, half], dim=-1)[:, None, None]


CASES = {
    "one tile of features": Case(),
    "two tiles of features": Case(narrow=17, wide=24, rotary=24),
    "a power of two": Case(narrow=16, wide=32, rotary=32),
    "partial rotary": Case(rotary=4),
    "rotary only in the first tile": Case(wide=40, rotary=22),
    "rotary into the second tile": Case(wide=40, rotary=36),
    "odd features": Case(narrow=5, wide=7, rotary=4),
    "no rotary": Case(rotary=0),
    "no rotary in two tiles": Case(wide=19, rotary=0),
    "no biases": Case(bias=False, wide=20, rotary=20),
    "one row": Case(length=1, batch=1, heads=1),
    "many heads, one sequence": Case(length=3, batch=1, heads=33),
}


def plain(heads: torch.Tensor, weights: object, case: Case) -> list[torch.Tensor]:
    simulated = simulate_plain(heads, weights)  # type: ignore[arg-type]
    if not case.rotary:
        return [simulated]
    rotated = apply_rope(simulated.unflatten(0, (case.length, case.batch)), case.angles().double())
    return [rotated.flatten(0, 1)[..., pair_order(case.wide, case.rotary).to(DEVICE)]]


# The default run covers each branch of the kernels once; no branch depends on the dtype.
@cases_in_dtypes(
    CASES,
    float32=(
        "two tiles of features",
        "partial rotary",
        "rotary into the second tile",
        "no rotary",
        "no biases",
        "one row",
    ),
    bfloat16=(
        "one tile of features",
        "a power of two",
        "rotary only in the first tile",
        "odd features",
        "no rotary in two tiles",
        "many heads, one sequence",
    ),
)
def test_results_and_gradients_equal_those_of_the_plain_simulation(name: str, dtype: torch.dtype) -> None:
    case, draws = CASES[name], Draws(len(name), dtype)
    heads = draws.tensor(case.length * case.batch, case.heads, case.narrow, scale=1.0)
    weights = draws.map_weights((case.wide, case.narrow), (case.wide, case.wide), bias=case.bias)
    rope_table = build_rope_table(case.angles()) if case.rotary else None
    with poisoned_memory():
        actual = gradients_of(
            lambda: [simulate_features(heads, weights, rope_table=rope_table, tiling=TILING)],
            [heads, *leaves_of(weights)],
        )
    wide_heads, wide_weights = as_float64(heads), in_float64(weights)
    expected = gradients_of(
        lambda: plain(wide_heads, wide_weights, case), [wide_heads, *leaves_of(wide_weights)]
    )
    assert_all_near(actual, expected, dtype)


def test_heads_and_gradients_may_have_any_strides() -> None:
    case, draws = Case(), Draws(2, torch.float32)
    weights = draws.map_weights((case.wide, case.narrow), (case.wide, case.wide), bias=True)
    heads = draws.tensor(case.heads, case.length * case.batch, 2 * case.narrow)
    rope_table = build_rope_table(case.angles())
    transposed = heads.transpose(0, 1)[..., ::2]
    results = []
    for given in (transposed, transposed.contiguous()):
        simulated = simulate_features(given, weights, rope_table=rope_table, tiling=TILING)
        outer = Draws(3, torch.float32).tensor(*simulated.shape[::-1]).detach().permute(2, 1, 0)
        results.append([simulated, *torch.autograd.grad(simulated, [heads, *weights], outer)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_heads_that_can_be_recomputed_are_not_saved() -> None:
    case, draws = Case(), Draws(4, torch.float32)
    base = draws.tensor(case.length * case.batch, case.heads, case.narrow)
    weights = draws.map_weights((case.wide, case.narrow), (case.wide, case.wide), bias=True)
    rope_table = build_rope_table(case.angles())
    results = []
    for recomputation in (None, Recomputation(lambda source: 2 * source, (base,))):
        heads = 2 * base
        with saved_addresses() as saved:
            simulated = simulate_features(
                heads, weights, rope_table=rope_table, tiling=TILING, recomputation=recomputation
            )
        assert (heads.data_ptr() in saved) == (recomputation is None)
        assert (base.data_ptr() in saved) == (recomputation is not None)
        results.append(torch.autograd.grad(simulated.sum(), [base, *weights]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_scores_do_not_depend_on_pair_order() -> None:
    order = pair_order(10, 6)
    assert order.tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8, 9]
    query, key = torch.randn(2, 7, 10, dtype=torch.float64)
    assert torch.allclose(query[:, order] @ key[:, order].T, query @ key.T)
