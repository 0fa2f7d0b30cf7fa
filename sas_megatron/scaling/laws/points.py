"""Points to which a law is fitted, from a CSV file or arrays, and checks that they determine the law."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sas_megatron.config.errors import FieldError, FileProblem, translate_os_errors
from sas_megatron.scaling.laws.log_sum import BoolArray, FloatArray, IntArray

REQUIRED = ("params", "tokens", "loss")
OPTIONAL = ("flops", "size", "variant", "epochs")
# The law has five parameters; with five points it interpolates them without any residual.
FEWEST_POINTS = 6
# E + A/N^α has three parameters, and so has E + B/D^β.
FEWEST_LEVELS = 3
# Relative difference up to which values count as equal: matched sizes, and tokens rounded to full batches.
SAME_LEVEL = 0.01
# If log D is linear in log N up to this share of its variance, N^-α and D^-β cannot be separated.
LEAST_FREE_VARIANCE = 1e-3


@dataclass(frozen=True)
class Points:
    """Runs as columns. `flops` are the training FLOPs with attention, or None if they are not recorded.

    `sizes` are the strata of the bootstrap. `epochs` are how many times each run read its training data, or
    None if they are not recorded.
    """

    params: FloatArray
    tokens: FloatArray
    loss: FloatArray
    flops: FloatArray | None
    sizes: NDArray[np.str_]
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
        epochs: Iterable[float] | None = None,
    ) -> Points:
        """Build points from columns; by default, equal parameter counts form a size.

        Raises:
            FieldError: A value is not a positive number.
        """
        columns = {"params": params, "tokens": tokens, "loss": loss}
        if flops is not None:
            columns["flops"] = flops
        if epochs is not None:
            columns["epochs"] = epochs
        arrays = {name: np.array(list(values), dtype=float) for name, values in columns.items()}
        for name, values in arrays.items():
            for row, value in enumerate(values):
                if not (math.isfinite(value) and value > 0):
                    raise FieldError(f"{name}[{row}]", value, *_positive(name))
        named = [f"{value:.0f}" for value in arrays["params"]] if sizes is None else sizes
        return Points(
            params=arrays["params"],
            tokens=arrays["tokens"],
            loss=arrays["loss"],
            flops=arrays.get("flops"),
            sizes=np.array(named, dtype=str),
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

    def take(self, chosen: BoolArray | IntArray) -> Points:
        """Select points by mask or index."""
        return dataclasses.replace(
            self,
            params=self.params[chosen],
            tokens=self.tokens[chosen],
            loss=self.loss[chosen],
            flops=None if self.flops is None else self.flops[chosen],
            sizes=self.sizes[chosen],
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
        if len(self) < FEWEST_POINTS:
            raise FieldError(
                "points",
                len(self),
                f"the law has five parameters and needs at least {FEWEST_POINTS} points",
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


def count_levels(values: FloatArray, *, tolerance: float = SAME_LEVEL) -> int:
    """Return the number of distinct values, where values within the relative tolerance are equal."""
    return int((np.diff(np.log(np.sort(values))) > tolerance).sum()) + 1


def read_points(path: str | Path, *, variant: str | None = None) -> Points:
    """Read a CSV file with the columns params, tokens, loss, and optionally flops, size, variant and epochs.

    Raises:
        FileProblem: The file cannot be read, lacks a column, or has a value that is not a positive number.
        FieldError: The file contains several variants and none is chosen, or not the chosen one.
    """
    try:
        with (
            translate_os_errors(path, problem="cannot be read", remedy="name a CSV file of points"),
            open(path, newline="", encoding="utf-8-sig") as file,
        ):
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = header
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileProblem(path, f"is not a CSV file ({error})", "use comma-separated text") from None
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise FileProblem(
            path,
            f"has no column {', '.join(missing)}",
            f"its first line must contain {','.join(REQUIRED)}, and may contain {', '.join(OPTIONAL)}",
        )
    if not rows:
        raise FileProblem(path, "has no points", "add a line for each run")
    rows = _choose_variant(rows, variant, has_column="variant" in header)
    columns = {
        name: [_number(path, line, name, row[name]) for line, row in rows]
        for name in (*REQUIRED, "flops", "epochs")
        if name in header
    }
    return Points.of(
        columns["params"],
        columns["tokens"],
        columns["loss"],
        flops=columns.get("flops"),
        sizes=[row["size"] or "" for _, row in rows] if "size" in header else None,
        epochs=columns.get("epochs"),
    )


_Rows = list[tuple[int, dict[str, str]]]


def _choose_variant(rows: _Rows, variant: str | None, *, has_column: bool) -> _Rows:
    if not has_column and variant is None:
        return rows
    present = sorted({row["variant"] or "" for _, row in rows}) if has_column else []
    if variant is None and len(present) == 1:
        return rows
    if variant not in present:
        if not present:
            raise FieldError("--variant", variant, "the points have no column variant", "omit the option")
        raise FieldError(
            "--variant",
            variant,
            f"a law is fitted to one variant, but the points contain {', '.join(present)}",
            "choose one of these",
        )
    return [(line, row) for line, row in rows if row["variant"] == variant]


def _number(path: str | Path, line: int, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        rule, remedy = _positive(name)
        raise FileProblem(path, f"line {line}: {name}={text or 'nothing'}: {rule}", remedy)
    return value


def _positive(name: str) -> tuple[str, str]:
    remedy = "remove diverged runs" if name == "loss" else "remove the run or correct the value"
    return "must be a positive number", remedy
