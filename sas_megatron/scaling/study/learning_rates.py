"""Peak learning rates of a study's runs: by a published rule, or by a sweep at the two smallest sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sas_megatron.config.errors import UserError


def kaplan_rate(parameters: int) -> float:
    """0.003239 − 0.0001395 ln N (Kaplan et al. 2020, eq. D.1), N without embeddings.

    Raises:
        UserError: so many parameters that the rule leaves nothing.
    """
    rate = 0.003239 - 0.0001395 * math.log(parameters)
    if rate <= 0:
        raise UserError(
            f"learning_rate.rule=kaplan: gives {rate:.2g} for {parameters:,} parameters; use step_law"
        )
    return rate


def step_law_rate(parameters: int, tokens: float) -> float:
    """1.79 N^−0.713 D^0.307 (Li et al. 2025, eq. 1), N without embeddings."""
    return float(1.79 * parameters**-0.713 * tokens**0.307)


def step_law_batch_tokens(tokens: float) -> float:
    """0.58 D^0.571 tokens of a step (Li et al. 2025, eq. 1)."""
    return float(0.58 * tokens**0.571)


@dataclass(frozen=True)
class Trial:
    """A finished run of a sweep."""

    learning_rate: float
    loss: float | None


@dataclass(frozen=True)
class BestRate:
    """The rate at the lowest loss of a sweep; `at_edge`: no higher, or no lower, rate was tried."""

    learning_rate: float
    at_edge: bool


def find_best_rate(trials: Sequence[Trial]) -> BestRate:
    """The minimum of the parabola through the best trial and its neighbours, over the rate's logarithm.

    A trial without a loss diverged. Where the best has no neighbour on a side, or that diverged, it stands
    as it is.

    Raises:
        UserError: all diverged.
    """
    ordered = sorted(trials, key=lambda trial: trial.learning_rate)
    losses = [math.inf if trial.loss is None else trial.loss for trial in ordered]
    best = min(range(len(ordered)), key=losses.__getitem__)
    if math.isinf(losses[best]):
        rates = ", ".join(f"{trial.learning_rate:.3g}" for trial in ordered)
        raise UserError(f"learning_rate.factors: every run of a sweep diverged ({rates}); try lower rates")
    own = ordered[best].learning_rate
    if best in (0, len(ordered) - 1):
        return BestRate(own, at_edge=True)
    if math.isinf(losses[best + 1]):
        return BestRate(own, at_edge=False)
    x = [math.log(trial.learning_rate) for trial in ordered[best - 1 : best + 2]]
    y = losses[best - 1 : best + 2]
    left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
    # Slopes left ≤ 0 ≤ right at the midpoints; all three losses equal: the middle one.
    if right - left <= 0:
        return BestRate(own, at_edge=False)
    middles = (x[0] + x[1]) / 2, (x[1] + x[2]) / 2
    minimum = middles[0] - left * (middles[1] - middles[0]) / (right - left)
    return BestRate(math.exp(minimum), at_edge=False)


def extend_rates(best: Mapping[str, float], parameters: Mapping[str, int]) -> dict[str, float]:
    """Rates for all sizes: those found, and a power of N through them for the rest.

    Args:
        best: Of two sizes, by name.
        parameters: Of every size, embeddings included, by name.
    """
    (one, first), (two, second) = best.items()
    exponent = math.log(second / first) / math.log(parameters[two] / parameters[one])
    others = {
        size: second * (count / parameters[two]) ** exponent
        for size, count in parameters.items()
        if size not in best
    }
    return {size: best.get(size, others.get(size, math.nan)) for size in parameters}
