"""Several checkpoints of one run are one observation: intervals, their coverage, and held-out runs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy import stats

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.hold_out import predict_largest
from sas_megatron.scaling.laws.law_fit import fit_law
from sas_megatron.scaling.laws.loss_surface import fit_surface, surface_quantities
from sas_megatron.scaling.laws.points import Points
from sas_megatron.scaling.laws.resampling import draw_point_weights, percentile_intervals
from tests.scaling.synthetic import CHINCHILLA
from tests.selection import cases, draws

NUM_CHECKPOINTS = 12
NAMES = ("E", "alpha", "beta")


def draw_runs(
    seed: int, *, sizes: int = 11, seeds: int = 2, num_checkpoints: int = NUM_CHECKPOINTS
) -> Points:
    """Draw runs whose error changes slowly along their checkpoints (correlation 0.9 between neighbours)."""
    generator = np.random.default_rng(seed)
    params_R = np.repeat(np.geomspace(2e7, 5e9, sizes), seeds)
    error_RC = generator.standard_normal((len(params_R), num_checkpoints))
    for number in range(1, num_checkpoints):
        error_RC[:, number] = 0.9 * error_RC[:, number - 1] + np.sqrt(1 - 0.9**2) * error_RC[:, number]
    params = np.repeat(params_R, num_checkpoints)
    tokens = params * np.tile(np.geomspace(5, 160, num_checkpoints), len(params_R))
    loss = CHINCHILLA.predict(params, tokens) * np.exp(0.004 * error_RC.ravel())
    runs = np.repeat(np.arange(len(params_R)), num_checkpoints)
    return Points.of(params, tokens, loss, runs=[f"run {run}" for run in runs])


def count_inside(points: Points, *, seed: int) -> Counter[str]:
    """Count the parameters of which the interval contains the truth."""
    fit = fit_surface(points)
    intervals = percentile_intervals(surface_quantities(fit.problem, fit.resample(num_draws=100, seed=seed)))
    return Counter(
        {name: int(low <= getattr(CHINCHILLA, name) <= high) for name, (low, high) in intervals.items()}
    )


@draws(12, 300)
@pytest.mark.parametrize(
    ("sizes", "seeds"), cases({(11, 2): "22 runs", (5, 3): "15 runs", (8, 1): "8 runs"}, default=[(8, 1)])
)
def test_intervals_over_checkpoints_cover_the_truth(sizes: int, seeds: int, num_draws: int) -> None:
    held: Counter[str] = Counter()
    for seed in range(num_draws):
        held += count_inside(draw_runs(seed, sizes=sizes, seeds=seeds), seed=seed)
    # With few runs the intervals may be too wide, but not too narrow.
    fewest = stats.binom.ppf(0.0005, num_draws, 0.95)
    assert min(held[name] for name in NAMES) >= fewest, held


def test_intervals_that_ignore_the_runs_are_too_narrow() -> None:
    held: Counter[str] = Counter()
    for seed in range(6):
        points = draw_runs(seed, num_checkpoints=30)
        held += count_inside(Points.of(points.params, points.tokens, points.loss), seed=seed)
    assert min(held[name] for name in NAMES) <= 3


def test_a_draw_takes_or_leaves_all_checkpoints_of_a_run() -> None:
    points = draw_runs(0, sizes=7, seeds=1, num_checkpoints=3)
    (weights,) = draw_point_weights(points, num_draws=60, seed=0)
    by_run = weights.reshape(60, 7, 3)
    np.testing.assert_array_equal(by_run, by_run[:, :, :1] * np.ones(3))
    # Six of seven runs are drawn, with weight 7/6 each, and some more than once.
    np.testing.assert_allclose(by_run[:, :, 0].sum(axis=1), 7)
    assert (by_run > 2).any()
    assert (by_run == 0).any()


def test_points_with_distinct_runs_are_independent() -> None:
    points = Points.of([10, 10, 20], [1, 2, 3], [3, 2, 1], runs=["a", "b", "c"])
    assert points.runs is None
    assert points.num_runs == 3


def test_all_checkpoints_of_the_largest_runs_are_held_out() -> None:
    points = draw_runs(0)
    held = predict_largest(points, share=0.02, num_draws=40, seed=0)
    assert len(held.runs) == 2 * NUM_CHECKPOINTS
    assert {run.params for run in held.runs} == {points.params.max()}


def test_law_names_the_number_of_runs() -> None:
    law = fit_law(draw_runs(3), num_draws=40)
    assert any("checkpoints of 22 runs: the bootstrap draws whole runs" in remark for remark in law.remarks)


def test_too_few_runs_and_runs_of_two_sizes_are_refused() -> None:
    with pytest.raises(FieldError, match="runs=5: the law has five parameters and needs at least 6 runs"):
        fit_surface(draw_runs(0, sizes=5, seeds=1))
    with pytest.raises(FieldError, match="run=a: has points of several sizes"):
        Points.of([10, 10, 20], [1, 2, 3], [3, 2, 1], runs=["a", "b", "a"])
