"""`sas-megatron fit`: a scaling law through a table of runs, with what is uncertain about it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from sas_megatron.scaling.numbers import format_interval

if TYPE_CHECKING:
    from rich.console import Console

    from sas_megatron.scaling.laws.fit_report import ComputeOptimal, FitReport
    from sas_megatron.scaling.laws.hold_out import HoldOut


@click.command()
@click.argument("points", type=click.Path())
@click.option("--variant", help="Which to fit, where a column variant names several.")
@click.option(
    "--drop-highest", type=int, default=0, show_default=True, help="Leave out so many of the highest losses."
)
@click.option("--bootstraps", type=int, default=1000, show_default=True, help="Draws for the intervals.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Of the draws.")
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the runs, the largest, to predict.",
)
@click.option("--json", "as_json", is_flag=True, help="Print an object in place of the tables.")
def fit(
    points: str,
    *,
    variant: str | None,
    drop_highest: int,
    bootstraps: int,
    seed: int,
    hold_out: float,
    as_json: bool,
) -> None:
    """Fit L(N, D) = E + A/N^α + B/D^β to POINTS, a CSV file with the columns params, tokens and loss.

    A column flops holds what each run's training took, attention included; without it C = 6ND is assumed.
    Columns size (what the bootstrap is stratified by; by default params) and variant may stand beside.
    """
    from sas_megatron.scaling.laws.fit_report import build_fit_report, report_tree
    from sas_megatron.scaling.laws.points import read_points

    report = build_fit_report(
        read_points(points, variant=variant),
        drop_highest=drop_highest,
        num_draws=bootstraps,
        seed=seed,
        hold_out=hold_out,
    )
    if as_json:
        click.echo(json.dumps(report_tree(report), indent=2, allow_nan=False))
    else:
        show_fit(report)


def show_fit(report: FitReport) -> None:
    """Prints the dropped points, the law, the exponents of each approach, the prediction and the remarks."""
    from rich.console import Console

    console = Console()
    for params, tokens, loss in zip(
        report.dropped.params, report.dropped.tokens, report.dropped.loss, strict=True
    ):
        console.print(f"Left out: {params:.4g} parameters, {tokens:.4g} tokens, loss {loss:.4f}.")
    _show_parameters(console, report)
    _show_exponents(console, report)
    _show_optimum(console, report.compute_optimal)
    _show_compute_laws(console, report)
    if report.hold_out is not None:
        _show_hold_out(console, report.hold_out)
    for remark in report.remarks:
        console.print(f"· {remark}", soft_wrap=True)


def _show_parameters(console: Console, report: FitReport) -> None:
    from rich.table import Table

    title = f"L(N, D) = E + A/N^α + B/D^β through {len(report.fit.points)} points"
    table = Table(title=title, title_justify="left")
    for heading in ("", "estimate", "95 % by bootstrap", "95 % profile, least squares", "by projection"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, label in (("E", "E"), ("A", "A"), ("B", "B"), ("alpha", "α"), ("beta", "β")):
        table.add_row(
            label,
            f"{getattr(report.fit.surface, name):.5g}",
            format_interval(report.ci95[name]),
            format_interval((report.profile95 or {}).get(name)),
            "–" if report.projected is None else f"{getattr(report.projected.surface, name):.5g}",
        )
    console.print(table)
    console.print(f"Sum of Huber losses of log residuals (δ = 0.001): {report.fit.fit.objective:.6g}.")


def _show_exponents(console: Console, report: FitReport) -> None:
    from rich.table import Table

    table = Table(title="Powers of compute C, with 95 % by bootstrap", title_justify="left")
    for heading in ("by", "best N", "best D", "loss above E"):
        table.add_column(heading)
    rows = {"law, C = 6ND": report.compute_optimal_6nd}
    if report.compute_optimal.cost.source == "flops":
        rows = {"law, recorded FLOPs": report.compute_optimal, **rows}
    for label, optimal in rows.items():
        table.add_row(
            label,
            *(
                f"{optimal.exponents[name]:.4f}\n{format_interval(optimal.ci95[name])}"
                for name in ("params_exponent", "tokens_exponent", "loss_exponent")
            ),
        )
    if (isoflop := report.isoflop) is not None:
        table.add_row(
            f"{len(isoflop.profiles)} isoFLOP profiles",
            f"{isoflop.params_exponent:.4f}\n{format_interval(isoflop.params_interval)}",
            f"{isoflop.tokens_exponent:.4f}\n{format_interval(isoflop.tokens_interval)}",
            "–",
        )
    console.print(table)


def _show_optimum(console: Console, optimal: ComputeOptimal) -> None:
    best, cost = optimal.at_largest, optimal.cost
    kind = "recorded" if cost.source == "flops" else "assumed"
    console.print(
        f"A token costs {cost.coefficient:.4g} · N^{cost.exponent:.4f} FLOPs ({kind}). Of the largest "
        f"budget, {best.flops:.3g} FLOPs, the best is {best.params:.4g} parameters on {best.tokens:.4g} "
        f"tokens: loss {best.loss:.4f}.",
        soft_wrap=True,
    )


def _show_compute_laws(console: Console, report: FitReport) -> None:
    for fit, form in ((report.compute_law, "E + K/C^γ"), (report.pure_compute_law, "K/C^γ")):
        if fit is not None:
            law = fit.law
            numbers = f"K = {law.K:.5g}, γ = {law.gamma:.4f}"
            console.print(
                f"Loss over compute of the {len(fit.problem.log_loss)} runs that none beats for fewer FLOPs: "
                f"{form} with {f'E = {law.E:.5g}, ' if form[0] == 'E' else ''}{numbers}; objective "
                f"{fit.objective:.4g}.",
                soft_wrap=True,
            )


def _show_hold_out(console: Console, hold_out: HoldOut) -> None:
    console.print(
        f"The {len(hold_out.runs)} largest runs, predicted from the other {hold_out.num_fitted} (up to "
        f"{hold_out.reach:.3g} times their FLOPs): {hold_out.root_mean_square_error:.2%} off in root mean "
        f"square, {hold_out.share_inside:.0%} within their 95 % intervals.",
        soft_wrap=True,
    )
