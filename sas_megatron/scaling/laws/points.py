"""Points to which a law is fitted, and checks that they can determine the law."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.laws.log_sum import BoolArray, FloatArray, IntArray

# The law has five parameters; with five points it interpolates them without any residual.
FEWEST_POINTS = 6
# E + A/N^α has three parameters, and so has E + B/D^β.
FEWEST_LEVELS = 3
# Relative difference up to which values count as equal: matched sizes, and tokens rounded to full batches.
SAME_LEVEL = 0.01
# If log D is linear in log N up to this share of its variance, N^-α and D^-β cannot be separated.
LEAST_FREE_VARIANCE = 1e-3
# Products and powers of values within these bounds cannot overflow.
SMALLEST, LARGEST = 1e-60, 1e60


@dataclass(frozen=True)
class Points:
    """Measured losses as columns.

    `flops` are the training FLOPs with attention, or None if they are not recorded. `sizes` and `runs` are
    numbers from 0 on: the stratum of the bootstrap, and the training run of each point. `runs` is None if
    every point is a run of its own; otherwise the points of a run are its checkpoints, whose errors are not
    independent. `epochs` are how many times each run read its training data, or None if they are not
    recorded.
    """

    params: FloatArray
    tokens: FloatArray
    loss: FloatArray
    flops: FloatArray | None
    sizes: IntArray
    runs: IntArray | None = None
    epochs: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.loss)

    @staticmethod
    def of(
        params: Iterable[float],
        tokens: Iterable[float],
        loss: Iterable[float],
        *,
        flops: Iterable[float] | None = None,
        sizes: Sequence[str] | None = None,
        runs: Sequence[str] | None = None,
        epochs: Iterable[float] | None = None,
    ) -> Points:
        """Build points from columns; by default, equal parameter counts form a size.

        Raises:
            FieldError: A value is not a positive number, or a run has several sizes.
        """
        columns = {"params": params, "tokens": tokens, "loss": loss}
        if flops is not None:
            columns["flops"] = flops
        if epochs is not None:
            columns["epochs"] = epochs
        arrays = {name: np.array(list(values), dtype=float) for name, values in columns.items()}
        for name, values in arrays.items():
            for row in np.flatnonzero(~is_valid(values))[:1]:
                raise FieldError(f"{name}[{row}]", values[row], *describe_valid(name, float(values[row])))
        # Numbers in ascending order of the size, so that the bootstrap does not depend on the unit.
        numbers = np.unique(arrays["params"], return_inverse=True)[1] if sizes is None else _number(sizes)
        return Points(
            params=arrays["params"],
            tokens=arrays["tokens"],
            loss=arrays["loss"],
            flops=arrays.get("flops"),
            sizes=numbers,
            runs=None if runs is None else _number_runs(runs, numbers),
            epochs=arrays.get("epochs"),
        )

    @property
    def flops_6nd(self) -> FloatArray:
        """6 N D, the C of Hoffmann et al. 2022 (section 3.3), which excludes the attention scores."""
        return 6 * self.params * self.tokens

    @property
    def compute(self) -> FloatArray:
        """The recorded FLOPs, or 6 N D if they are not recorded."""
        return self.flops_6nd if self.flops is None else self.flops

    @property
    def num_runs(self) -> int:
        """Number of independent runs."""
        return len(self) if self.runs is None else len(np.unique(self.runs))

    def take(self, chosen: BoolArray | IntArray) -> Points:
        """Select points by mask or index."""
        return dataclasses.replace(
            self,
            params=self.params[chosen],
            tokens=self.tokens[chosen],
            loss=self.loss[chosen],
            flops=None if self.flops is None else self.flops[chosen],
            sizes=self.sizes[chosen],
            runs=None if self.runs is None else self.runs[chosen],
            epochs=None if self.epochs is None else self.epochs[chosen],
        )

    def drop_highest(self, count: int) -> tuple[Points, Points]:
        """Return the points without the highest losses, and the dropped points, highest first.

        Besiroglu et al. 2024 drop five outliers of the Chinchilla runs in this way.

        Raises:
            FieldError: `count` is negative, or no points remain.
        """
        if not 0 <= count < len(self):
            raise FieldError(
                "--drop-highest", count, f"must be less than the number of points, {len(self)}", "drop fewer"
            )
        order = np.argsort(-self.loss, kind="stable")
        return self.take(np.sort(order[count:])), self.take(order[:count])

    def check_surface(self) -> None:
        """Check that the points determine L(N, D).

        Raises:
            FieldError: There are too few points, sizes or token budgets, or tokens are a function of size.
        """
        for name, count in (("points", len(self)), ("runs", self.num_runs)):
            if count < FEWEST_POINTS:
                raise FieldError(
                    name,
                    count,
                    f"the law has five parameters and needs at least {FEWEST_POINTS} {name}",
                    "add runs",
                )
        for name, values in (("params", self.params), ("tokens", self.tokens)):
            levels = count_levels(values)
            if levels < FEWEST_LEVELS:
                raise FieldError(
                    name,
                    f"{levels} value{'s' if levels > 1 else ''}",
                    f"the law needs at least {FEWEST_LEVELS} values that differ by more than "
                    f"{SAME_LEVEL:.0%}",
                    "add sizes" if name == "params" else "add token budgets",
                )
        correlation = float(np.corrcoef(np.log(self.params), np.log(self.tokens))[0, 1])
        if 1 - correlation**2 < LEAST_FREE_VARIANCE:
            raise FieldError(
                "tokens",
                "a power of params",
                "N and D must vary independently, since A/N^α and B/D^β cannot be separated otherwise",
                "train a size on several token budgets",
            )


def find_levels(values: FloatArray, *, tolerance: float = SAME_LEVEL) -> IntArray:
    """Return the number of each value's level, counted from 0 for the lowest values.

    A level contains the values that exceed its lowest value by at most the relative tolerance.
    """
    order = np.argsort(values, kind="stable")
    ascending = np.asarray(values)[order]
    starts = [0]
    while (end := int(np.searchsorted(ascending, ascending[starts[-1]] * (1 + tolerance), "right"))) < len(
        ascending
    ):
        starts.append(end)
    levels = np.empty(len(ascending), dtype=np.intp)
    levels[order] = np.searchsorted(starts, np.arange(len(ascending)), "right") - 1
    return levels


def count_levels(values: FloatArray, *, tolerance: float = SAME_LEVEL) -> int:
    """Return the number of levels of `find_levels`."""
    return int(find_levels(values, tolerance=tolerance).max()) + 1


def is_valid(values: FloatArray) -> BoolArray:
    """Return whether each value is a positive number within the supported range."""
    return np.isfinite(values) & (values >= SMALLEST) & (values <= LARGEST)


def describe_valid(name: str, value: float) -> tuple[str, str]:
    """Return the rule that an invalid value of a column breaks, and the remedy."""
    if value > 0 and np.isfinite(value):
        return f"must be between {SMALLEST:g} and {LARGEST:g}", "use another unit or correct the value"
    remedy = "remove diverged runs" if name == "loss" else "remove the run or correct the value"
    return "must be a positive number", remedy


def _number(labels: Sequence[str]) -> IntArray:
    """Return the number of each label, in order of first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.intp)


def _number_runs(runs: Sequence[str], sizes: IntArray) -> IntArray | None:
    """Return the number of each point's run, or None if every point is a run of its own."""
    numbers = _number(runs)
    size_of: dict[int, int] = {}
    for label, run, size in zip(runs, numbers.tolist(), sizes.tolist(), strict=True):
        if size_of.setdefault(run, size) != size:
            raise FieldError(
                "run",
                label,
                "has points of several sizes, but a run trains one model",
                "rename one of the runs",
            )
    return numbers if len(size_of) < len(numbers) else None
