"""Figures of the fitted laws of a slice: loss against tokens, residuals and isoFLOP profiles.

Sizes and budgets are shades of one colour map; variants have a panel each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sas_megatron.scaling.drawing import INK, MARKERS, choose_style
from sas_megatron.scaling.laws.isoflop import group_budgets
from sas_megatron.scaling.laws.law_fit import LawFit
from sas_megatron.scaling.laws.loss_surface import surface_quantities
from sas_megatron.scaling.report import ReportFigure
from sas_megatron.scaling.study.analysis import SliceAnalysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Draws for the bands of the laws; the intervals in the tables use more.
BAND_DRAWS = 200
LOSS_LABEL = "validation loss (nats per token)"


def list_law_figures(analysis: SliceAnalysis) -> list[ReportFigure]:
    """Return the figures of the laws that could be fitted."""
    fits = {law.variant: law.fit for law in analysis.laws if law.fit is not None}
    if not fits:
        return []
    variants = list(analysis.slice.rows)
    figures = [
        ReportFigure(
            "laws",
            "Laws L(N, D)",
            "Measured losses against tokens by size, and the fitted law of each variant with its 95 % "
            "bootstrap band.",
            (min(12.5, 4.4 * len(fits)), 4.4),
            lambda figure: _draw_laws(figure, fits),
        ),
        ReportFigure(
            "residuals",
            "Residuals of the laws",
            "Predicted loss divided by measured loss, minus 1, of every run against its FLOPs.",
            (9.0, 3.6),
            lambda figure: _draw_residuals(figure, fits, variants),
        ),
    ]
    profiled = {variant: fit for variant, fit in fits.items() if fit.isoflop is not None}
    if profiled:
        figures.append(
            ReportFigure(
                "isoflop",
                "IsoFLOP profiles",
                "Loss against parameters for each budget of FLOPs, with the fitted parabola and its minimum.",
                (min(12.5, 4.4 * len(profiled)), 4.4),
                lambda figure: _draw_isoflop(figure, profiled),
            )
        )
    return figures


def format_thousands(panel: Axes) -> None:
    """Label the ticks of the horizontal axis with SI prefixes, such as 10 M."""
    from matplotlib.ticker import EngFormatter

    panel.xaxis.set_major_formatter(EngFormatter())


def _set_log_ticks(panel: Axes) -> None:
    """Give a logarithmic horizontal axis the ticks 1, 2 and 5 times powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    panel.xaxis.set_minor_formatter(NullFormatter())
    format_thousands(panel)
    panel.tick_params(axis="x", labelsize=8)


def _list_shades(count: int) -> list[Any]:
    import matplotlib

    return [matplotlib.colormaps["cividis"](0.05 + 0.8 * index / max(1, count - 1)) for index in range(count)]


def _draw_laws(figure: Figure, fits: Mapping[str, LawFit]) -> None:
    panels = np.atleast_1d(figure.subplots(1, len(fits), sharey=True))
    for panel, (variant, fit) in zip(panels, fits.items(), strict=True):
        _draw_law(panel, fit)
        panel.set_title(variant)
        panel.set_xlabel("tokens")
    panels[0].set_ylabel(LOSS_LABEL)


def _draw_law(panel: Axes, law: LawFit) -> None:
    fit = law.fit
    points = fit.points
    quantities = surface_quantities(fit.problem, fit.resample(num_draws=BAND_DRAWS, seed=1))
    E, A, B, alpha, beta = (quantities[name][:, None] for name in ("E", "A", "B", "alpha", "beta"))
    sizes = sorted(set(points.params.tolist()))
    grid = np.geomspace(points.tokens.min(), points.tokens.max(), 60)
    for index, (size, shade) in enumerate(zip(sizes, _list_shades(len(sizes)), strict=True)):
        chosen = points.params == size
        panel.plot(
            points.tokens[chosen],
            points.loss[chosen],
            color=shade,
            marker=MARKERS[index % len(MARKERS)],
            linestyle="",
            markersize=4.5,
            label=f"{size / 1e6:.3g} M parameters",
        )
        panel.plot(grid, fit.surface.predict(np.full_like(grid, size), grid), color=shade, linewidth=1.2)
        draws = E + A * size**-alpha + B * grid[None] ** -beta
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        panel.fill_between(grid, low, high, color=shade, alpha=0.18, linewidth=0)
    _set_log_ticks(panel)
    panel.legend(frameon=False, fontsize=8)


def _draw_residuals(figure: Figure, fits: Mapping[str, LawFit], variants: Sequence[str]) -> None:
    panel = figure.subplots()
    for variant, law in fits.items():
        style = {**choose_style(variants.index(variant)), "linestyle": ""}
        residuals = 100 * np.expm1(law.fit.log_residuals)
        panel.plot(law.fit.points.compute, residuals, **style, markersize=4.5, label=variant)
    panel.axhline(0.0, color=INK, linewidth=0.9)
    panel.set_xscale("log")
    panel.set_xlabel("training FLOPs")
    panel.set_ylabel("predicted / measured − 1 (%)")
    panel.legend(frameon=False, ncols=len(fits))


def _draw_isoflop(figure: Figure, fits: Mapping[str, LawFit]) -> None:
    panels = np.atleast_1d(figure.subplots(1, len(fits), sharey=True))
    for panel, (variant, law) in zip(panels, fits.items(), strict=True):
        points = law.fit.points
        groups = group_budgets(points.compute)
        for index, (group, shade) in enumerate(zip(groups, _list_shades(len(groups)), strict=True)):
            chosen = points.take(group)
            panel.plot(
                chosen.params,
                chosen.loss,
                color=shade,
                marker=MARKERS[index % len(MARKERS)],
                linestyle="",
                label=f"{chosen.compute.mean():.2g} FLOPs",
            )
        for profile in () if law.isoflop is None else law.isoflop.profiles:
            grid = np.geomspace(profile.smallest, profile.largest, 60)
            panel.plot(
                grid,
                profile.loss + profile.curvature * np.log(grid / profile.params) ** 2,
                color=INK,
                linewidth=1.2,
            )
            panel.plot(profile.params, profile.loss, color=INK, marker="x", linestyle="")
        _set_log_ticks(panel)
        panel.set_title(variant)
        panel.set_xlabel("parameters")
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel(LOSS_LABEL)
