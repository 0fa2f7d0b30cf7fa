"""`sas-megatron fit`: fit a scaling law to a table of runs, with uncertainty estimates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from sas_megatron.config.errors import FieldError
from sas_megatron.scaling.numbers import MISSING, format_interval

if TYPE_CHECKING:
    from rich.console import Console

    from sas_megatron.scaling.laws.hold_out import HoldOut
    from sas_megatron.scaling.laws.law_fit import ComputeOptimal, LawFit, OtherMethods

PARAMETERS = {"E": "E", "A": "A", "B": "B", "alpha": "α", "beta": "β"}
LARGEST_SIZE = "largest-size"
# FLOPs per token that are proportional to N up to this difference of exponents give the exponents of 6ND.
SAME_EXPONENT = 1e-4


def _parse_hold_out(_context: click.Context, _parameter: click.Parameter, value: str) -> float | None:
    """Return the fraction of the runs, or None for the runs of the largest size.

    Raises:
        FieldError: The value is neither.
    """
    if value == LARGEST_SIZE:
        return None
    try:
        fraction = float(value)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction < 1:
        raise FieldError(
            "--hold-out", value, f"must be a fraction between 0 and 1 or {LARGEST_SIZE}", "use 0.1"
        )
    return fraction


@click.command()
@click.argument("points", type=click.Path())
@click.option(
    "--columns",
    metavar="ROLE=NAME,...",
    help='Names of columns that differ, for example params="Model Size",tokens=D.',
)
@click.option("--variant", help="Variant to fit, if a column variant contains several.")
@click.option(
    "--drop-highest", type=int, default=0, show_default=True, help="Number of highest losses to leave out."
)
@click.option("--bootstraps", type=int, default=1000, show_default=True, help="Bootstrap draws.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Seed of the bootstrap."
)
@click.option(
    "--hold-out",
    callback=_parse_hold_out,
    default="0.1",
    show_default=True,
    metavar=f"FRACTION|{LARGEST_SIZE}",
    help=f"Runs to predict from the others: a fraction, those with the most FLOPs, or {LARGEST_SIZE}.",
)
@click.option(
    "--other-methods",
    is_flag=True,
    help="Also fit by least squares, with intervals by profile likelihood, and by variable projection.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of the tables.")
def fit(
    points: str,
    *,
    columns: str | None,
    variant: str | None,
    drop_highest: int,
    bootstraps: int,
    seed: int,
    hold_out: float | None,
    other_methods: bool,
    as_json: bool,
) -> None:
    """Fit L(N, D) = E + A/N^α + B/D^β to POINTS, a table with the columns params, tokens and loss.

    The table is CSV, TSV, text with semicolons, JSON lines or Parquet. Optional columns: flops, the training
    FLOPs of each run with attention (without it, C = 6ND is assumed); run, if several points are checkpoints
    of one run; size, the strata of the bootstrap (default: params); variant; and epochs, how many times a run
    read its training data.
    """
    from sas_megatron.scaling.laws.law_fit import fit_law
    from sas_megatron.scaling.laws.law_record import law_fit_record
    from sas_megatron.scaling.laws.point_table import parse_columns, read_points

    fitted = fit_law(
        read_points(points, variant=variant, columns=parse_columns(columns) if columns is not None else None),
        drop_highest=drop_highest,
        num_draws=bootstraps,
        seed=seed,
        hold_out=hold_out,
        use_other_methods=other_methods,
    )
    if as_json:
        click.echo(json.dumps(law_fit_record(fitted), indent=2, allow_nan=False))
    else:
        print_law_fit(fitted)


def print_law_fit(law: LawFit) -> None:
    """Print the dropped points, the law, its exponents of compute, the prediction and the remarks."""
    from rich.console import Console

    console = Console()
    for params, tokens, loss in zip(law.dropped.params, law.dropped.tokens, law.dropped.loss, strict=True):
        console.print(f"Dropped: {params:.4g} parameters, {tokens:.4g} tokens, loss {loss:.4f}.")
    _show_parameters(console, law)
    _show_exponents(console, law)
    _show_optimum(console, law.compute_optimal)
    _show_compute_laws(console, law)
    if law.hold_out is not None:
        _show_hold_out(console, law.hold_out)
    if law.other_methods is not None:
        _show_other_methods(console, law.other_methods)
    for remark in law.remarks:
        console.print(f"· {remark}", soft_wrap=True)


def _show_parameters(console: Console, law: LawFit) -> None:
    from rich.table import Table

    points = law.fit.points
    of_runs = "" if points.runs is None else f" of {points.num_runs} runs"
    console.print(f"L(N, D) = E + A/N^α + B/D^β through {len(points)} points{of_runs}", style="italic")
    table = Table()
    for heading in ("", "estimate", "95 % interval"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, label in PARAMETERS.items():
        table.add_row(label, f"{getattr(law.fit.surface, name):.5g}", format_interval(law.ci95[name]))
    console.print(table)
    console.print(f"Sum of Huber losses of log residuals (δ = 0.001): {law.fit.fit.objective:.6g}.")


def _show_exponents(console: Console, law: LawFit) -> None:
    from rich.table import Table

    table = Table(title="Exponents of compute C, with 95 % intervals", title_justify="left")
    for heading in ("method", "optimal N", "optimal D", "loss above E"):
        table.add_column(heading)
    rows = {"law, C = 6ND": law.compute_optimal_6nd}
    if law.compute_optimal.cost.source == "flops":
        rows = {"law, recorded FLOPs": law.compute_optimal, **rows}
    if abs(law.compute_optimal.cost.exponent - 1) < SAME_EXPONENT:
        rows = {"law": law.compute_optimal}
    for label, optimal in rows.items():
        table.add_row(
            label,
            *(
                f"{optimal.exponents[name]:.4f}\n{format_interval(optimal.ci95[name])}"
                for name in ("params_exponent", "tokens_exponent", "loss_exponent")
            ),
        )
    if (isoflop := law.isoflop) is not None:
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
        f"FLOPs per token: {cost.coefficient:.4g} · N^{cost.exponent:.4f} ({kind}). Optimum at the largest "
        f"budget of {best.flops:.3g} FLOPs: {best.params:.4g} parameters on {best.tokens:.4g} tokens, loss "
        f"{best.loss:.4f}.",
        soft_wrap=True,
    )


def _show_compute_laws(console: Console, law: LawFit) -> None:
    for fit, form in ((law.compute_law, "E + K/C^γ"), (law.pure_compute_law, "K/C^γ")):
        if fit is not None and fit.is_distinct:
            curve = fit.law
            numbers = f"K = {curve.K:.5g}, γ = {curve.gamma:.4f}"
            console.print(
                f"Loss over compute of the {len(fit.problem.log_loss)} runs on the Pareto frontier: "
                f"{form} with {f'E = {curve.E:.5g}, ' if form[0] == 'E' else ''}{numbers}; objective "
                f"{fit.objective:.4g}.",
                soft_wrap=True,
            )


def _show_hold_out(console: Console, hold_out: HoldOut) -> None:
    console.print(
        f"Prediction of the {len(hold_out.runs)} largest runs from the other {hold_out.num_fitted} (up to "
        f"{hold_out.reach:.3g} times their FLOPs): root mean square error "
        f"{hold_out.root_mean_square_error:.2%}; {hold_out.num_inside} of {len(hold_out.runs)} within 95 % "
        "intervals of the noise, which leave out the error of the law beyond the fitted runs.",
        soft_wrap=True,
    )


def _show_other_methods(console: Console, other: OtherMethods) -> None:
    from rich.table import Table

    table = Table(title="Other methods", title_justify="left")
    for heading in ("", "least squares", "95 % profile likelihood", "variable projection"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, label in PARAMETERS.items():
        squares, projected = (
            MISSING if fit is None else f"{getattr(fit.surface, name):.5g}"
            for fit in (other.least_squares, other.projected)
        )
        table.add_row(label, squares, format_interval((other.profile95 or {}).get(name)), projected)
    console.print(table)
