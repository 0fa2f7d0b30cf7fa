"""Points that do not determine a law end in one sentence; points that do keep their law."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.hold_out import predict_largest
from sas_megatron.scaling.laws.law_fit import fit_law
from sas_megatron.scaling.laws.law_record import law_fit_record
from sas_megatron.scaling.laws.loss_surface import FEWEST_FOR_INTERVALS, check_determined, fit_surface
from sas_megatron.scaling.laws.points import Points, count_levels, find_levels
from sas_megatron.scaling.laws.resampling import draw_weights
from tests.scaling.laws.public_tables import olmo_ladder
from tests.scaling.synthetic import CHINCHILLA, draw_grid
from tests.selection import draws

UNDETERMINED = "these points do not determine a law"


def draw_noise(seed: int, *, count: int = 30, noise: float = 0.05) -> Points:
    """Draw losses that depend neither on size nor on tokens."""
    generator = np.random.default_rng(seed)
    params = np.exp(generator.uniform(np.log(1e7), np.log(1e9), count))
    tokens = params * np.exp(generator.uniform(np.log(5), np.log(100), count))
    return Points.of(params, tokens, 3 * np.exp(noise * generator.standard_normal(count)))


def draw_six(seed: int, *, noise: float) -> Points:
    """Draw the fewest points that can have a law: three sizes with two token budgets each."""
    params = np.repeat([2e7, 3e8, 5e9], 2)
    tokens = params * np.array([5, 160, 5, 160, 5, 40])
    normal = np.random.default_rng(seed).standard_normal(6)
    return Points.of(params, tokens, CHINCHILLA.predict(params, tokens) * np.exp(noise * normal))


@draws(12, 1000)
def test_pure_noise_has_no_law(num_draws: int) -> None:
    fitted = []
    for seed in range(num_draws):
        with contextlib.suppress(FieldError):
            fit_surface(draw_noise(seed))
            fitted.append(seed)
    # The F test is approximate for a law that is not linear: its nominal level is 0.1 %.
    assert len(fitted) <= 0.01 * num_draws
    with pytest.raises(FieldError, match=f"{UNDETERMINED}: a constant loss describes them nearly as well"):
        fit_surface(draw_noise(0))


@pytest.mark.parametrize("noise", [0.0, 0.004, 0.02])
def test_six_points_have_no_law(noise: float) -> None:
    for seed in range(3):
        with pytest.raises(FieldError, match=UNDETERMINED):
            fit_law(draw_six(seed, noise=noise), num_draws=60)


def test_at_least_half_of_the_draws_from_eight_runs_contain_five_distinct_ones() -> None:
    shares = []
    for runs in (FEWEST_FOR_INTERVALS - 1, FEWEST_FOR_INTERVALS):
        weights = draw_weights([0] * runs, num_draws=20_000, generator=np.random.default_rng(0))
        shares.append(float(((weights > 0).sum(axis=1) >= 5).mean()))
    assert shares[0] < 0.5 < shares[1]


@draws(4, 200)
def test_noisy_laws_are_kept(num_draws: int) -> None:
    for seed in range(num_draws):
        law = fit_law(draw_grid(seed, sizes=4, budgets=3, seeds=1, noise=0.005), num_draws=60)
        assert 0 < law.ci95["alpha"][0] < law.ci95["alpha"][1] < 2


def test_law_whose_irreducible_loss_is_zero_is_refused() -> None:
    points = draw_grid(0, noise=0.0, truth=dataclasses.replace(CHINCHILLA, E=1e-9))
    with pytest.raises(FieldError, match=f"{UNDETERMINED}: the 95 % interval of the irreducible loss E ends"):
        fit_law(points, num_draws=40)


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.1, 2.1), (np.nan, np.nan), (0.2, np.inf)])
def test_wide_intervals_of_an_exponent_are_refused(interval: tuple[float, float]) -> None:
    points = draw_grid(0)
    check_determined(points, {"E": (0.0, 1.5), "alpha": (0.1, 1.9), "beta": (0.2, 0.3)})
    with pytest.raises(
        FieldError, match=f"points=60: {UNDETERMINED}: the 95 % interval of the exponent beta"
    ):
        check_determined(points, {"E": (0.0, 1.5), "alpha": (0.1, 1.9), "beta": interval})


def test_levels_are_counted_by_value_not_by_gaps() -> None:
    assert count_levels(np.geomspace(1e6, 1e7, 10_000)) == pytest.approx(np.log(10) / np.log(1.01), rel=0.02)
    assert find_levels(np.array([30.0, 10.0, 10.05, 10.2, 30.1])).tolist() == [2, 0, 0, 1, 2]
    assert count_levels(np.array([5.0])) == 1


def test_many_distinct_sizes_have_a_law() -> None:
    generator = np.random.default_rng(0)
    params = np.geomspace(1e7, 1e10, 3000)
    tokens = params * np.exp(generator.uniform(np.log(5), np.log(160), 3000))
    loss = CHINCHILLA.predict(params, tokens) * np.exp(0.004 * generator.standard_normal(3000))
    fit = fit_surface(Points.of(params, tokens, loss))
    # With so many points, the starting points are found on a part of them.
    assert fit.surface.alpha == pytest.approx(CHINCHILLA.alpha, abs=0.01)
    assert fit.surface.beta == pytest.approx(CHINCHILLA.beta, abs=0.01)


def test_largest_size_of_the_olmo_ladder_is_predicted_within_two_percent() -> None:
    held = predict_largest(olmo_ladder(), share=None, num_draws=100, seed=1)
    assert [run.params for run in held.runs] == [3_169_537_280] * 4
    assert held.num_fitted == 16
    # The errors are -1.7 %, -0.9 %, -0.6 % and -0.9 %.
    assert held.root_mean_square_error == pytest.approx(0.0111, abs=0.0002)
    assert all(-0.017 < run.relative_error < 0 for run in held.runs)


def test_whole_number_losses_end_in_a_law_or_in_a_message() -> None:
    for seed in range(3):
        points = draw_grid(seed, sizes=3 + seed, budgets=4, seeds=1)
        rounded = dataclasses.replace(points, loss=np.round(points.loss))
        with contextlib.suppress(FieldError):
            record = law_fit_record(fit_law(rounded, num_draws=40))
            assert "NaN" not in json.dumps(record, allow_nan=False)
