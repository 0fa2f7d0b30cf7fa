"""A study's figures: each draws on an empty figure what one slice's analysis holds, and nothing else.

Variants keep colour, marker and line style through all of them; sizes are lightnesses of one colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sas_megatron.scaling.drawing import COLORS, INK, LINE_STYLES, MARKERS
from sas_megatron.scaling.gains import Gain
from sas_megatron.scaling.laws.fit_report import FitReport
from sas_megatron.scaling.laws.isoflop import group_budgets
from sas_megatron.scaling.laws.loss_surface import surface_quantities
from sas_megatron.scaling.laws.resampling import draw_weights
from sas_megatron.scaling.study.analysis import SliceAnalysis, VariantLaw
from sas_megatron.scaling.study.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Draws for the bands of the laws; the intervals in the tables take more.
BAND_DRAWS = 200
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---", "ooo", "+++")


@dataclass(frozen=True)
class StudyFigure:
    """A figure that can be drawn at any time; `text` says what it shows, for those who do not see it."""

    name: str
    title: str
    text: str
    size: tuple[float, float]
    draw: Callable[[Figure], None]


def list_figures(analysis: SliceAnalysis) -> list[StudyFigure]:
    """All figures that the slice has something for."""
    variants = list(analysis.slice.rows)
    fitted = [law for law in analysis.laws if law.report is not None]
    figures = [
        StudyFigure(
            "frontier",
            "Final loss against training FLOPs",
            f"Final validation loss of every run of {', '.join(variants)} against its training FLOPs; runs "
            "of one size are joined, seeds are averaged.",
            (9.0, 5.2),
            lambda figure: _draw_frontier(figure, analysis),
        ),
        StudyFigure(
            "curves",
            "Learning curves of the largest size",
            "Validation loss over training of each variant's largest size and budget, against tokens, FLOPs "
            "and seconds; seeds are averaged.",
            (12.5, 4.4),
            lambda figure: _draw_curves(figure, analysis),
        ),
    ]
    if any(comparison.compute_gains or comparison.time_gains for comparison in analysis.comparisons):
        figures.append(
            StudyFigure(
                "gain",
                "Gain against budget",
                "What the baseline would have to spend for the variant's loss, over what the variant spends, "
                "by budget, with 95 % bands; above 1 the variant is worth its cost.",
                (10.5, 4.4),
                lambda figure: _draw_gains(figure, analysis),
            )
        )
    if fitted:
        figures.append(
            StudyFigure(
                "laws",
                "Laws L(N, D)",
                "Measured losses against tokens by size, and the fitted law of each variant with its 95 % "
                "band by bootstrap.",
                (min(12.5, 4.4 * len(fitted)), 4.4),
                lambda figure: _draw_laws(figure, fitted),
            )
        )
        figures.append(
            StudyFigure(
                "residuals",
                "Residuals of the laws",
                "Predicted over measured loss, less 1, of every run against its FLOPs.",
                (9.0, 3.6),
                lambda figure: _draw_residuals(figure, fitted, variants),
            )
        )
    with_profiles = [law for law in fitted if law.report is not None and law.report.isoflop is not None]
    if with_profiles:
        figures.append(
            StudyFigure(
                "isoflop",
                "IsoFLOP profiles",
                "Loss against parameters at each budget of FLOPs, the parabola through it and its minimum.",
                (min(12.5, 4.4 * len(with_profiles)), 4.4),
                lambda figure: _draw_isoflop(figure, with_profiles),
            )
        )
    figures.append(
        StudyFigure(
            "costs",
            "What a token's FLOPs are spent on, at the largest size",
            "Training FLOPs of a token by term, for each variant's largest size.",
            (9.0, 1.4 + 0.5 * len(variants)),
            lambda figure: _draw_costs(figure, analysis),
        )
    )
    return figures


def _style(analysis: SliceAnalysis, variant: str) -> dict[str, Any]:
    index = list(analysis.slice.rows).index(variant)
    return _style_of(index)


def _style_of(index: int) -> dict[str, Any]:
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
    }


def _draw_frontier(figure: Figure, analysis: SliceAnalysis) -> None:
    panel = figure.subplots()
    for variant, rows in analysis.slice.rows.items():
        label: str | None = variant
        for size in dict.fromkeys(row.size for row in rows):
            means = _mean_losses([row for row in rows if row.size == size])
            if not means:
                continue
            flops, losses, low, high = zip(*means, strict=True)
            style = _style(analysis, variant)
            panel.plot(flops, losses, **style, markersize=5, linewidth=1.3, label=label)
            panel.vlines(flops, low, high, color=style["color"], linewidth=1.0)
            label = None
    panel.set_xscale("log")
    panel.set_xlabel("training FLOPs")
    panel.set_ylabel("validation loss (nats a token)")
    panel.legend(frameon=False)


def _mean_losses(rows: Sequence[Row]) -> list[tuple[float, float, float, float]]:
    """By budget: FLOPs, and the mean, least and largest loss of the seeds."""
    found = []
    for budget in sorted({row.budget for row in rows}):
        own = [row for row in rows if row.budget == budget and row.loss is not None]
        losses = [row.loss for row in own if row.loss is not None]
        if losses:
            found.append((own[0].training_flops, sum(losses) / len(losses), min(losses), max(losses)))
    return found


def _draw_curves(figure: Figure, analysis: SliceAnalysis) -> None:
    panels = figure.subplots(1, 3, sharey=True)
    settled: list[float] = []
    for variant, rows in analysis.slice.rows.items():
        done = [row for row in rows if row.curve_loss]
        if not done:
            continue
        largest = max(done, key=lambda row: (row.params, row.budget))
        seeds = [
            row
            for row in done
            if (row.size, row.budget) == (largest.size, largest.budget)
            and row.curve_steps == largest.curve_steps
        ]
        losses = np.array([row.curve_loss for row in seeds], dtype=float).mean(axis=0)
        seconds = np.array(largest.curve_seconds)
        if analysis.slice.is_timed_in_turn and largest.step_seconds is not None:
            seconds = np.array(largest.curve_steps) * largest.step_seconds
        for panel, spent in zip(panels, (largest.curve_tokens, largest.curve_flops, seconds), strict=True):
            panel.plot(
                spent, losses, **_style(analysis, variant), markersize=3.5, linewidth=1.3, label=variant
            )
        settled.extend(losses[len(losses) // 4 :])
    for panel, label in zip(panels, ("tokens", "training FLOPs", "training seconds"), strict=True):
        panel.set_xlabel(label)
        _name_thousands(panel)
    panels[0].set_ylabel("validation loss (nats a token)")
    if settled:
        margin = 0.05 * (max(settled) - min(settled) or 1.0)
        panels[0].set_ylim(min(settled) - margin, max(settled) + margin)
    panels[-1].legend(frameon=False)


def _draw_gains(figure: Figure, analysis: SliceAnalysis) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for comparison in analysis.comparisons:
        gains = (comparison.compute_gains, comparison.time_gains)
        for panel, found in zip(panels, gains, strict=True):
            known = [gain for gain in found or () if gain.gain is not None]
            if known:
                _draw_gain(panel, known, comparison.candidate, _style(analysis, comparison.candidate))
    baseline = next(iter(analysis.slice.rows))
    for panel, name in zip(panels, ("training FLOPs", "training seconds"), strict=True):
        panel.axhline(1.0, color=INK, linewidth=0.9)
        panel.set_xscale("log")
        panel.set_xlabel(f"budget of {name}")
    panels[0].set_ylabel(f"{baseline} must spend, of the variant's budget")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False)


def _draw_gain(panel: Axes, gains: Sequence[Gain], variant: str, style: dict[str, Any]) -> None:
    budgets = [gain.budget for gain in gains]
    panel.plot(
        budgets, [gain.gain or np.nan for gain in gains], **style, markersize=4, linewidth=1.4, label=variant
    )
    banded = [gain for gain in gains if gain.gain_interval is not None]
    intervals = [gain.gain_interval for gain in gains if gain.gain_interval is not None]
    highest = 3 * max(gain.gain or 0.0 for gain in gains)
    panel.fill_between(
        [gain.budget for gain in banded],
        [low for low, _ in intervals],
        # A band without an upper end leaves the frame.
        [min(high, highest) for _, high in intervals],
        color=style["color"],
        alpha=0.18,
        linewidth=0,
    )


def _name_thousands(panel: Axes) -> None:
    """Ticks of the horizontal axis as 10 M, not as 1.0 with 10⁷ aside."""
    from matplotlib.ticker import EngFormatter

    panel.xaxis.set_major_formatter(EngFormatter())


def _count_on_log_axis(panel: Axes) -> None:
    """A horizontal axis of logarithms with ticks at 200 k, 500 k, 1 M, and no names between them."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    panel.xaxis.set_minor_formatter(NullFormatter())
    _name_thousands(panel)
    panel.tick_params(axis="x", labelsize=8)


def _shades(number: int) -> list[Any]:
    import matplotlib

    return [
        matplotlib.colormaps["cividis"](0.05 + 0.8 * index / max(1, number - 1)) for index in range(number)
    ]


def _draw_laws(figure: Figure, laws: Sequence[VariantLaw]) -> None:
    panels = np.atleast_1d(figure.subplots(1, len(laws), sharey=True))
    for panel, law in zip(panels, laws, strict=True):
        assert law.report is not None
        _draw_law(panel, law.report)
        panel.set_title(law.variant)
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("validation loss (nats a token)")


def _draw_law(panel: Axes, report: FitReport) -> None:
    points, fit = report.fit.points, report.fit
    weights = draw_weights(points.sizes.tolist(), num_draws=BAND_DRAWS, seed=1)
    draws = fit.problem.refit(weights, fit.fit)
    quantities = surface_quantities(fit.problem, draws)
    sizes = sorted(set(points.params.tolist()))
    grid = np.geomspace(points.tokens.min(), points.tokens.max(), 60)
    for index, (size, shade) in enumerate(zip(sizes, _shades(len(sizes)), strict=True)):
        own = points.params == size
        panel.plot(
            points.tokens[own],
            points.loss[own],
            color=shade,
            marker=MARKERS[index % len(MARKERS)],
            linestyle="",
            markersize=4.5,
            label=f"{size / 1e6:.3g} M parameters",
        )
        panel.plot(grid, fit.surface.predict(np.full_like(grid, size), grid), color=shade, linewidth=1.2)
        drawn = (
            quantities["E"][:, None]
            + quantities["A"][:, None] * size ** -quantities["alpha"][:, None]
            + quantities["B"][:, None] * grid[None] ** -quantities["beta"][:, None]
        )
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        panel.fill_between(grid, low, high, color=shade, alpha=0.18, linewidth=0)
    _count_on_log_axis(panel)
    panel.legend(frameon=False, fontsize=8)


def _draw_residuals(figure: Figure, laws: Sequence[VariantLaw], variants: Sequence[str]) -> None:
    panel = figure.subplots()
    for law in laws:
        assert law.report is not None
        points = law.report.fit.points
        style = {**_style_of(variants.index(law.variant)), "linestyle": ""}
        residuals = 100 * np.expm1(law.report.fit.log_residuals)
        panel.plot(points.compute, residuals, **style, markersize=4.5, label=law.variant)
    panel.axhline(0.0, color=INK, linewidth=0.9)
    panel.set_xscale("log")
    panel.set_xlabel("training FLOPs")
    panel.set_ylabel("law over measured, less 1 (%)")
    panel.legend(frameon=False, ncols=len(laws))


def _draw_isoflop(figure: Figure, laws: Sequence[VariantLaw]) -> None:
    panels = np.atleast_1d(figure.subplots(1, len(laws), sharey=True))
    for panel, law in zip(panels, laws, strict=True):
        assert law.report is not None
        assert law.report.isoflop is not None
        points = law.report.fit.points
        groups = group_budgets(points.compute)
        for index, (group, shade) in enumerate(zip(groups, _shades(len(groups)), strict=True)):
            chosen = points.take(group)
            panel.plot(
                chosen.params,
                chosen.loss,
                color=shade,
                marker=MARKERS[index % len(MARKERS)],
                linestyle="",
                label=f"{chosen.compute.mean():.2g} FLOPs",
            )
            if len(set(chosen.params.tolist())) >= 3:
                x = np.log(chosen.params)
                grid = np.linspace(x.min(), x.max(), 60)
                panel.plot(
                    np.exp(grid), np.polyval(np.polyfit(x, chosen.loss, 2), grid), color=shade, linewidth=1.2
                )
        for profile in law.report.isoflop.profiles:
            panel.plot(profile.params, profile.loss, color=INK, marker="x", linestyle="")
        _count_on_log_axis(panel)
        panel.set_title(law.variant)
        panel.set_xlabel("parameters")
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("validation loss (nats a token)")


def _draw_costs(figure: Figure, analysis: SliceAnalysis) -> None:
    panel = figure.subplots()
    largest = {
        variant: max(rows, key=lambda row: row.params) for variant, rows in analysis.slice.rows.items()
    }
    terms = dict.fromkeys(
        name for row in largest.values() for name, count in row.flops_per_token.items() if count
    )
    positions = list(range(len(largest)))
    left = np.zeros(len(largest))
    for index, term in enumerate(terms):
        widths = np.array([row.flops_per_token.get(term, 0.0) for row in largest.values()])
        panel.barh(
            positions,
            widths,
            left=left,
            color=COLORS[index % len(COLORS)],
            hatch=HATCHES[(index // len(COLORS) * 3 + index) % len(HATCHES)],
            edgecolor="white",
            linewidth=0.6,
            label=term.replace("_", " "),
        )
        left += widths
    panel.set_yticks(positions, list(largest))
    panel.invert_yaxis()
    panel.set_xlabel("training FLOPs of a token")
    _name_thousands(panel)
    figure.legend(loc="outside right center", frameon=False)
