"""The points that a law is fitted to, from a CSV file or arrays; those that can tell no law are refused."""

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
OPTIONAL = ("flops", "size", "variant")
# The law has five parameters; with as many points it goes through each and says nothing.
FEWEST_POINTS = 6
# E + A/N^α has three unknowns in the sizes alone, and E + B/D^β in the tokens.
FEWEST_LEVELS = 3
# Values so near are one: matched sizes, and tokens rounded to whole batches.
SAME_LEVEL = 0.01
# Where log D is a line in log N up to this share of its variance, N^-α and D^-β cannot be told apart.
LEAST_FREE_VARIANCE = 1e-3


@dataclass(frozen=True)
class Points:
    """One run a row. `flops` are all that its training took, attention included; None: not recorded.

    `sizes` name what the bootstrap is stratified by.
    """

    params: FloatArray
    tokens: FloatArray
    loss: FloatArray
    flops: FloatArray | None
    sizes: NDArray[np.str_]

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
    ) -> Points:
        """From columns; without `sizes` each number of parameters is one.

        Raises:
            FieldError: a value is not a positive number.
        """
        columns = {"params": params, "tokens": tokens, "loss": loss}
        if flops is not None:
            columns["flops"] = flops
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
        )

    @property
    def flops_6nd(self) -> FloatArray:
        """6 N D: without attention's scores, and what Hoffmann et al. 2022 call C (section 3.3)."""
        return 6 * self.params * self.tokens

    @property
    def compute(self) -> FloatArray:
        """The recorded FLOPs, or 6 N D where none are."""
        return self.flops_6nd if self.flops is None else self.flops

    def take(self, chosen: BoolArray | IntArray) -> Points:
        """Some of the points, by mask or by index."""
        return dataclasses.replace(
            self,
            params=self.params[chosen],
            tokens=self.tokens[chosen],
            loss=self.loss[chosen],
            flops=None if self.flops is None else self.flops[chosen],
            sizes=self.sizes[chosen],
        )

    def drop_highest(self, count: int) -> tuple[Points, Points]:
        """What is left without the points of the highest losses, and those, highest first.

        Besiroglu et al. 2024 leave out five so, as outliers of the Chinchilla runs.

        Raises:
            FieldError: `count` is negative, or leaves nothing.
        """
        if not 0 <= count < len(self):
            raise FieldError(
                "--drop-highest", count, f"must leave some of the {len(self)} points", "drop fewer"
            )
        order = np.argsort(-self.loss, kind="stable")
        return self.take(np.sort(order[count:])), self.take(order[:count])

    def check_surface(self) -> None:
        """Whether L(N, D) can be fitted to these points at all.

        Raises:
            FieldError: too few points, sizes or token budgets, or tokens that follow from the size.
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
                    f"the law can be told from at least {FEWEST_LEVELS} that differ by more than "
                    f"{SAME_LEVEL:.0%}",
                    "add sizes" if name == "params" else "add token budgets",
                )
        correlation = float(np.corrcoef(np.log(self.params), np.log(self.tokens))[0, 1])
        if 1 - correlation**2 < LEAST_FREE_VARIANCE:
            raise FieldError(
                "tokens",
                "a power of params",
                "N and D must vary apart from each other, since A/N^α and B/D^β are one term otherwise",
                "train a size on several token budgets",
            )


def count_levels(values: FloatArray, *, tolerance: float = SAME_LEVEL) -> int:
    """How many values there are that differ by more than the tolerance, as a share."""
    return int((np.diff(np.log(np.sort(values))) > tolerance).sum()) + 1


def read_points(path: str | Path, *, variant: str | None = None) -> Points:
    """Reads a CSV file with the columns params, tokens, loss, and flops, size and variant if they are there.

    Raises:
        FileProblem: the file cannot be read, lacks a column, or has a value that is no positive number.
        FieldError: it holds several variants and none is chosen, or not the one that is.
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
        raise FileProblem(path, f"is not a CSV file ({error})", "write comma-separated text") from None
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise FileProblem(
            path,
            f"has no column {', '.join(missing)}",
            f"its first line must name {','.join(REQUIRED)}, and may name {', '.join(OPTIONAL)}",
        )
    if not rows:
        raise FileProblem(path, "has no points", "write a line for each run")
    rows = _choose_variant(rows, variant, has_column="variant" in header)
    columns = {
        name: [_number(path, line, name, row[name]) for line, row in rows]
        for name in (*REQUIRED, "flops")
        if name in header
    }
    return Points.of(
        columns["params"],
        columns["tokens"],
        columns["loss"],
        flops=columns.get("flops"),
        sizes=[row["size"] or "" for _, row in rows] if "size" in header else None,
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
            raise FieldError("--variant", variant, "the points have no column variant", "leave it out")
        raise FieldError(
            "--variant",
            variant,
            f"a law is fitted to one variant, and the points are of {', '.join(present)}",
            "choose one of them",
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
    remedy = "leave runs out that diverged" if name == "loss" else "leave the run out or mend the value"
    return "must be a positive number", remedy
