"""Inputs of a comparison: finished runs as rows of numbers, and loss curves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.points import Points

Axis = Literal["params", "tokens", "flops", "causal_flops", "seconds"]
AXES: tuple[Axis, ...] = ("params", "tokens", "flops", "causal_flops", "seconds")
# Both conventions of attention FLOPs are compared: all S² pairs of tokens, and the causal half.
Spending = Literal["flops", "causal_flops", "seconds"]
SPENDING: tuple[Spending, ...] = ("flops", "causal_flops", "seconds")
AXIS_NAMES: dict[Axis, str] = {
    "params": "parameters and tokens",
    "tokens": "tokens",
    "flops": "FLOPs",
    "causal_flops": "FLOPs of the causal half",
    "seconds": "time",
}


@dataclass(frozen=True)
class Outcome:
    """A run that completed its schedule.

    `size` and `budget` are labels that the matched runs of all variants share; the budget is a number as
    text. `flops` are the training FLOPs of the full run, with all S² pairs of tokens; `causal_flops` count
    the causal half. `seconds` is None if the time was not measured, and `loss` is None if the run diverged.
    `seconds_error` is the relative standard error of the seconds, and `epochs` is how many times the run read
    its training data; None if they are not known.
    """

    variant: str
    size: str
    budget: str
    seed: int
    params: int
    tokens: int
    flops: float
    causal_flops: float
    seconds: float | None
    loss: float | None
    seconds_error: float | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        for field in (*AXES, "loss"):
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise FieldError(
                    f"{field} of {self.variant} {self.size} {self.budget} seed {self.seed}",
                    value,
                    "must be a positive number",
                    "use None for a missing value",
                )

    @property
    def cell(self) -> tuple[str, str]:
        """The size and budget of the run; seeds are repetitions within a cell."""
        return self.size, self.budget

    def known(self, field: Axis | Literal["loss"]) -> float:
        """Return a value that must not be missing.

        Raises:
            ValueError: The value is None.
        """
        value: float | None = getattr(self, field)
        if value is None:
            raise ValueError(f"{self.variant} {self.cell} seed {self.seed} has no {field}")
        return value


@dataclass(frozen=True)
class LossCurve:
    """Validation losses of a run by step; `planned_steps` is the length of its learning rate schedule."""

    variant: str
    size: str
    budget: str
    seed: int
    schedule: str
    planned_steps: int
    tokens_per_step: float
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    # Peak learning rate; None if it is not recorded.
    learning_rate: float | None = None


def choose_variant(outcomes: Sequence[Outcome], variant: str) -> list[Outcome]:
    """Return the runs of one variant that have a loss.

    Raises:
        FieldError: There is no such run, or two runs have the same size, budget and seed.
    """
    chosen = [outcome for outcome in outcomes if outcome.variant == variant and outcome.loss is not None]
    if not chosen:
        known = ", ".join(sorted({outcome.variant for outcome in outcomes})) or "none"
        raise FieldError("variant", variant, "has no run with a loss", f"choose among {known}")
    duplicates = [run for run, count in Counter((*run.cell, run.seed) for run in chosen).items() if count > 1]
    if duplicates:
        size, budget, seed = duplicates[0]
        raise FieldError(
            "variant",
            variant,
            f"has two runs of size {size}, budget {budget}, seed {seed}",
            "use distinct names of sizes and budgets, or another seed for one of the runs",
        )
    return chosen


def count_diverged(outcomes: Sequence[Outcome], variant: str) -> int:
    """Return the number of runs of a variant that have no loss."""
    return sum(outcome.variant == variant and outcome.loss is None for outcome in outcomes)


def gather_points(outcomes: Sequence[Outcome], variant: str) -> Points:
    """Return the runs of a variant as points for a scaling law.

    The budgets of one size and seed are dependent, as checkpoints of one run.

    Raises:
        FieldError: The variant has no run with a loss, or a value is not a positive number.
    """
    chosen = choose_variant(outcomes, variant)
    seeds = [f"{outcome.size}, seed {outcome.seed}" for outcome in chosen]
    epochs = [outcome.epochs for outcome in chosen if outcome.epochs is not None]
    return Points.of(
        [outcome.params for outcome in chosen],
        [outcome.tokens for outcome in chosen],
        [outcome.known("loss") for outcome in chosen],
        flops=[outcome.flops for outcome in chosen],
        sizes=[outcome.size for outcome in chosen],
        runs=seeds if len(set(seeds)) < len(seeds) else None,
        epochs=epochs if len(epochs) == len(chosen) else None,
    )
