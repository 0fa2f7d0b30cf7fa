"""Prediction of the largest runs by a law that is fitted to the other runs.

The intervals of the predictions contain the error of the fitted parameters and the noise of a single run.
They leave out the error of the law itself beyond the sizes and tokens to which it was fitted: on public
tables, 67 to 83 % of the held-out losses are within these 95 % intervals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import FloatArray
from sas_megatron.scaling.laws.loss_surface import SurfaceFit, fit_surface
from sas_megatron.scaling.laws.points import SAME_LEVEL, Points
from sas_megatron.scaling.laws.resampling import Interval, percentile_interval


@dataclass(frozen=True)
class HeldOutRun:
    """A held-out run: its loss, the predicted loss, and the 95 % interval without the error of the law."""

    params: float
    tokens: float
    loss: float
    predicted: float
    noise95: Interval

    @property
    def relative_error(self) -> float:
        """(Predicted − measured) / measured loss."""
        return self.predicted / self.loss - 1


@dataclass(frozen=True)
class HoldOut:
    """The held-out runs in order of FLOPs; `reach` is their largest FLOPs over those fitted."""

    runs: tuple[HeldOutRun, ...]
    num_fitted: int
    reach: float

    @property
    def root_mean_square_error(self) -> float:
        """Root mean square of the relative errors."""
        return math.sqrt(sum(run.relative_error**2 for run in self.runs) / len(self.runs))

    @property
    def num_inside(self) -> int:
        """Number of the runs within their intervals."""
        return sum(run.noise95[0] <= run.loss <= run.noise95[1] for run in self.runs)

    @property
    def share_inside(self) -> float:
        """Fraction of the runs within their intervals."""
        return self.num_inside / len(self.runs)


def predict_largest(points: Points, *, share: float | None, num_draws: int, seed: int) -> HoldOut:
    """Fit a law without the largest runs, and predict these.

    Args:
        points: All runs.
        share: Fraction of the points to hold out, those with the most FLOPs; points with equal FLOPs, and all
            checkpoints of a run, are held out together. None holds out the points of the largest size.
        num_draws: Bootstrap draws for the intervals.
        seed: Seed of the bootstrap.

    Raises:
        FieldError: The share is not between 0 and 1, or the law cannot be fitted to the remaining runs.
    """
    if share is None:
        largest = points.params >= points.params.max() * (1 - SAME_LEVEL)
    elif 0 < share < 1:
        count = max(1, math.ceil(share * len(points)))
        largest = points.compute >= np.sort(points.compute)[-count] * (1 - SAME_LEVEL)
    else:
        raise FieldError("--hold-out", share, "must be a fraction of the runs between 0 and 1", "use 0.1")
    if points.runs is not None:
        largest = np.isin(points.runs, points.runs[largest])
    rest, held = points.take(~largest), points.take(largest)
    fit = fit_surface(rest)
    held = held.take(np.argsort(held.compute, kind="stable"))
    predicted = fit.surface.predict(held.params, held.tokens)
    intervals = _predict_intervals(fit, held, num_draws=num_draws, seed=seed)
    runs = zip(held.params, held.tokens, held.loss, predicted, intervals, strict=True)
    return HoldOut(
        tuple(
            HeldOutRun(float(params), float(tokens), float(loss), float(guess), interval)
            for params, tokens, loss, guess, interval in runs
        ),
        len(rest),
        float(held.compute.max() / rest.compute.max()),
    )


def _predict_intervals(fit: SurfaceFit, held: Points, *, num_draws: int, seed: int) -> list[Interval]:
    """Return percentile intervals of the bootstrap predictions plus the noise of a single run.

    The noise is drawn from the residuals of the fit.
    """
    theta_RP = fit.resample(num_draws=num_draws, seed=seed)
    predicted_RI = fit.problem.predict(theta_RP, np.log(np.stack([held.params, held.tokens])))
    residuals_I: FloatArray = fit.log_residuals
    # The residuals of a fit with five parameters are smaller than the noise.
    inflation = math.sqrt(len(residuals_I) / max(1, len(residuals_I) - len(fit.fit.theta)))
    noise_RI = np.random.default_rng([seed, 1]).choice(residuals_I, size=predicted_RI.shape) * inflation
    return [percentile_interval(column) for column in (predicted_RI * np.exp(-noise_RI)).T]
