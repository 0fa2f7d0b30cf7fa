"""What happens inside the models of a study, side by side: a table for each question, and a figure.

The models are those of the largest size and budget. Values are means over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sas_megatron.scaling.drawing import choose_style
from sas_megatron.scaling.layer_measurements import find_last
from sas_megatron.scaling.numbers import MISSING, format_share, format_significant
from sas_megatron.scaling.report import Block, Grid, ReportFigure
from sas_megatron.scaling.study.study_table import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Panels in a row of the figure.
COLUMNS = 3
HEADINGS = ("variant", "of", "first", "last", "least layer", "most layer")
NOTE = (
    "Models of size {size} and budget {budget}{part}, mean over seeds: the mean over the layers at the first "
    "and the last evaluation, and the layers with the least and the most at the last one."
)

Values = Sequence[float | None]
# The runs of a variant at the largest size and budget, by variant.
Runs = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Mechanism:
    """A question that measurements inside the models answer.

    Attributes:
        question: The question.
        meaning: What the values mean.
        names: Measurements by name, or by the beginning of their names up to a dot.
        format: Formats a value.
    """

    question: str
    meaning: str
    names: tuple[str, ...]
    format: Callable[[float | None], str] = format_significant

    def find_names(self, rows: Sequence[Row]) -> list[str]:
        """Return the measurements of runs that belong to the mechanism, in its order."""
        measured = sorted({name for row in rows for name in row.layer_curves})
        return [
            name
            for wanted in self.names
            for name in measured
            if name == wanted or name.startswith(f"{wanted}.")
        ]


MECHANISMS = (
    Mechanism(
        "Do simulated copies become different heads?",
        "Mean cosine between the r simulated copies of a head: 1 for equal copies, 0 for unrelated and −1 "
        "for opposite ones.",
        ("copy_similarity",),
        lambda value: MISSING if value is None else f"{value:.3f}".replace("-", "−"),
    ),
    Mechanism(
        "Do ReLU units of the simulation die?",
        "Share of units that are positive for no token of the probe batch.",
        ("silent_units",),
        format_share,
    ),
    Mechanism(
        "How sharply do heads attend?",
        "Mean entropy of the attention weights in nats, and the largest score of all heads.",
        ("mean_entropy", "largest_score"),
    ),
    Mechanism(
        "Does the signal grow with depth?",
        "Root mean square of the results of a layer and of its two branches.",
        ("residual_rms", "attention_rms", "mlp_rms"),
    ),
    Mechanism(
        "Does every part train?",
        "Norm of the gradient before clipping, and norm of the last update that is not 0 (the learning rate "
        "may end at 0) divided by that of the weights.",
        ("gradient_norm", "update_ratio"),
    ),
)


def choose_runs(rows_of_variants: Mapping[str, Sequence[Row]]) -> Runs:
    """Return the measured runs of each variant at its largest size and budget; {} without measurements."""
    chosen: dict[str, list[Row]] = {}
    for variant, rows in rows_of_variants.items():
        measured = [row for row in rows if row.layer_steps]
        if measured:
            largest = max(measured, key=lambda row: (row.params, row.budget))
            chosen[variant] = [
                row
                for row in measured
                if (row.size, row.budget, row.layer_steps)
                == (largest.size, largest.budget, largest.layer_steps)
            ]
    return chosen


def list_mechanism_blocks(runs: Runs, *, name: str = "mechanisms") -> tuple[Block, ...]:
    """Return a block with a table for each mechanism that was measured, and the figure of all of them.

    Args:
        runs: The runs of each variant (`choose_runs`).
        name: Name of the figure.
    """
    blocks = [
        Block(mechanism.question, mechanism.meaning, grid)
        for mechanism in MECHANISMS
        if (grid := mechanism_grid(mechanism, runs)) is not None
    ]
    figure = mechanism_figure(runs, name=name)
    return (
        Block(note=describe_runs(runs)),
        *blocks,
        *([] if figure is None else [Block(figure.title, figure=figure)]),
    )


def describe_runs(runs: Runs, *, name: str = "") -> str:
    """Return which models were measured, and what the columns of the tables are.

    Args:
        runs: The runs of each variant.
        name: Name of the slice of the study, if it has several.
    """
    rows = [row for of_variant in runs.values() for row in of_variant]
    sizes, budgets = ({getattr(row, field) for row in rows} for field in ("size", "budget"))
    return NOTE.format(
        size=", ".join(sorted(sizes)),
        budget=", ".join(f"{budget:g}" for budget in sorted(budgets)),
        part=f" ({name})" if name else "",
    )


def mechanism_grid(mechanism: Mechanism, runs: Runs) -> Grid | None:
    """Return a line for each variant and measurement; None if no variant has one."""
    lines = []
    for variant, rows in runs.items():
        for name in mechanism.find_names(rows):
            curves = [row.layer_curves[name] for row in rows if name in row.layer_curves]
            layers = [row.layer_values[name] for row in rows if name in row.layer_values]
            ends = (_average([curve[index] for curve in curves]) for index in (0, find_last(name, curves[0])))
            lines.append(
                (
                    variant,
                    _shorten(name),
                    *map(mechanism.format, ends),
                    *_describe_extremes(layers, mechanism.format),
                )
            )
    return Grid(HEADINGS, tuple(lines)) if lines else None


def _shorten(name: str) -> str:
    """Return a measurement's name without the name of its group, where that is the question's subject."""
    group, _, part = name.partition(".")
    if group in ("copy_similarity", "silent_units"):
        return part.replace(".", " ")
    return {"update_ratio": "update", "gradient_norm": "gradient"}.get(group, group.replace("_", " ")) + (
        f", {part}" if part else ""
    )


def _describe_extremes(
    seeds: Sequence[Values], format_value: Callable[[float | None], str]
) -> tuple[str, str]:
    """Return the least and the largest value of the layers, each with the number of its layer."""
    layers = [_average(values) for values in zip(*seeds, strict=True)]
    known = [(value, number) for number, value in enumerate(layers, 1) if value is not None]
    if not known:
        return MISSING, MISSING
    least, most = min(known), max(known)
    return tuple(f"{format_value(value)} in {number}" for value, number in (least, most))  # type: ignore[return-value]


def _average(values: Values) -> float | None:
    """Return the mean over seeds; None if a value is missing."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def mechanism_figure(runs: Runs, *, name: str) -> ReportFigure | None:
    """Return the curves of all measurements of the first two mechanisms, and the entropies, by variant."""
    rows = [row for of_variant in runs.values() for row in of_variant]
    names = [found for mechanism in MECHANISMS[:3] for found in mechanism.find_names(rows)]
    if not names:
        return None
    num_rows = math.ceil(len(names) / COLUMNS)
    return ReportFigure(
        name,
        "Similarity of simulated copies, silent units and attention during training",
        "Similarity of the simulated copies of a head, share of silent units, mean entropy and largest score "
        f"of {', '.join(runs)} against training tokens, mean over layers and seeds.",
        (3.6 * min(COLUMNS, len(names)) + 0.6, 2.4 * num_rows + 0.6),
        lambda figure: _draw(figure, runs, names),
    )


def _draw(figure: Figure, runs: Runs, names: Sequence[str]) -> None:
    num_rows = math.ceil(len(names) / COLUMNS)
    panels = figure.subplots(num_rows, min(COLUMNS, len(names)), squeeze=False, sharex=True).flatten()
    labelled: dict[str, Any] = {}
    for panel, name in zip(panels, names, strict=False):
        for index, (variant, rows) in enumerate(runs.items()):
            curves = [row.layer_curves[name] for row in rows if name in row.layer_curves]
            if not curves:
                continue
            values = [_average(of_step) for of_step in zip(*curves, strict=True)]
            tokens = [step * rows[0].tokens / rows[0].steps for step in rows[0].layer_steps]
            (line,) = panel.plot(
                tokens,
                [math.nan if value is None else value for value in values],
                **choose_style(index),
                markersize=3,
                linewidth=1.2,
            )
            labelled[variant] = line
        panel.set_title(name.replace("_", " ").replace(".", ", "), loc="left", fontsize=10)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(names) - COLUMNS) : len(names)]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("training tokens")
    figure.legend(
        labelled.values(),
        labelled.keys(),
        loc="outside lower center",
        ncols=min(5, len(labelled)),
        frameon=False,
    )
