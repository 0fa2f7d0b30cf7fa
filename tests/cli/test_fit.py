"""`sas-megatron fit`: its output, its errors, and its run time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from sas_megatron.cli.main import cli
from sas_megatron.scaling.laws.loss_surface import fit_surface
from sas_megatron.scaling.laws.points import Points
from tests.conftest import ROOT
from tests.fork_server import run_command
from tests.scaling.synthetic import CHINCHILLA, draw_grid, draw_isoflops
from tests.selection import exhaustive

# Limits on two cores, for a fit without and with intervals.
FIT_SECONDS, THOUSAND_BOOTSTRAPS_SECONDS = 10, 60


def write(path: Path, points: Points, *, flops: bool = True, **columns: list[Any]) -> Path:
    names = ["params", "tokens", "loss", *(["flops"] if flops else []), *columns]
    values = [points.params, points.tokens, points.loss, *([points.compute] if flops else [])]
    rows = zip(*values, *columns.values(), strict=True)
    lines = [",".join(names), *(",".join(str(value) for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def fit(*arguments: object, status: int = 0) -> str:
    done = run_command("fit", *arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


def fit_json(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["fit", *map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    tree: dict[str, Any] = json.loads(done.stdout)
    return tree


def test_json_contains_the_law_its_intervals_and_the_optimal_exponents(tmp_path: Path) -> None:
    points = draw_grid(0)
    tree = fit_json(write(tmp_path / "points.csv", points), "--bootstraps", 100)
    surface = fit_surface(points).surface
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = tree["ci95"][name]
        assert tree[name] == pytest.approx(getattr(surface, name), rel=1e-4)
        assert low <= tree[name] <= high
        assert low <= getattr(CHINCHILLA, name) <= high
    assert tree["n_points"] == 60
    assert tree["objective"] == pytest.approx(fit_surface(points).fit.objective, rel=1e-6)
    optimal = tree["compute_optimal"]
    joint = tree["alpha"] + tree["beta"]
    assert optimal["params_exponent"] == pytest.approx(tree["beta"] / joint)
    assert optimal["tokens_exponent"] == pytest.approx(tree["alpha"] / joint)
    assert optimal["loss_exponent"] == pytest.approx(tree["alpha"] * tree["beta"] / joint)
    cost = optimal["flops_per_token"]
    assert cost["source"] == "flops"
    assert (cost["coefficient"], cost["exponent"]) == pytest.approx((6, 1))
    assert tree["hold_out"]["n_fitted"] == 54
    assert tree["n_runs"] == 60
    assert tree["isoflop"] is None
    assert tree["compute_law"]["objective"] <= tree["pure_compute_law"]["objective"]
    assert tree["compute_law"]["gamma"] > tree["pure_compute_law"]["gamma"] > 0
    assert tree["pure_compute_law"]["E"] == 0
    assert any(remark.startswith("No isoFLOP profiles") for remark in tree["remarks"])


def test_optimum_uses_recorded_flops_instead_of_6nd(tmp_path: Path) -> None:
    points = draw_grid(0)
    attention = Points.of(
        points.params, points.tokens, points.loss, flops=90 * points.params**0.88 * points.tokens
    )
    tree = fit_json(write(tmp_path / "points.csv", attention), "--bootstraps", 60)
    plain = fit_json(write(tmp_path / "plain.csv", points, flops=False), "--bootstraps", 60)
    alpha, beta = tree["alpha"], tree["beta"]
    assert tree["compute_optimal"]["params_exponent"] == pytest.approx(beta / (alpha + 0.88 * beta))
    assert tree["compute_optimal_6nd"]["params_exponent"] == pytest.approx(beta / (alpha + beta))
    assert plain["compute_optimal"] == plain["compute_optimal_6nd"]
    assert plain["compute_optimal"]["flops_per_token"]["source"] == "6ND"
    assert any("C = 6ND is assumed" in remark for remark in plain["remarks"])
    assert not any("C = 6ND is assumed" in remark for remark in tree["remarks"])


def test_highest_losses_are_dropped_and_printed(tmp_path: Path) -> None:
    points = draw_grid(0)
    loss = points.loss.copy()
    loss[[7, 31]] = 8.125, 9.5
    path = write(tmp_path / "points.csv", Points.of(points.params, points.tokens, loss), flops=False)
    tree = fit_json(path, "--drop-highest", 2, "--bootstraps", 60)
    assert [run["loss"] for run in tree["dropped"]] == [9.5, 8.125]
    assert tree["n_points"] == 58
    expected = fit_surface(points.take(np.delete(np.arange(60), [7, 31]))).surface
    assert tree["alpha"] == pytest.approx(expected.alpha, rel=1e-4)
    printed = fit(path, "--drop-highest", 2, "--bootstraps", 60)
    assert [line for line in printed.splitlines() if line.startswith("Dropped")] == [
        f"Dropped: {points.params[at]:.4g} parameters, {points.tokens[at]:.4g} tokens, loss {value:.4f}."
        for at, value in ((31, 9.5), (7, 8.125))
    ]


def test_tables_agree_with_the_json(tmp_path: Path) -> None:
    path = write(tmp_path / "points.csv", draw_isoflops(0), size=[f"s{number % 9}" for number in range(240)])
    printed = fit(path, "--bootstraps", 60)
    tree = fit_json(path, "--bootstraps", 60)
    assert "through 240 points" in printed
    assert f"{tree['alpha']:.5g}" in printed
    assert f"{tree['compute_optimal']['params_exponent']:.4f}" in printed
    assert f"{len(tree['isoflop']['profiles'])} isoFLOP profiles" in printed
    assert f"{tree['isoflop']['params_exponent']:.4f}" in printed
    assert f"Prediction of the {len(tree['hold_out']['runs'])} largest runs" in printed


def test_page_states_one_estimate_and_other_methods_only_on_request(tmp_path: Path) -> None:
    points = draw_grid(0)
    path = write(tmp_path / "points.csv", points)
    plain, other = fit_json(path, "--bootstraps", 60), fit_json(path, "--bootstraps", 60, "--other-methods")
    assert plain["least_squares"] is plain["profile95"] is plain["projection"] is None
    assert set(other["profile95"]) == {"E", "alpha", "beta"}
    low, high = other["profile95"]["alpha"]
    assert low <= other["least_squares"]["alpha"] <= high
    assert other["projection"]["alpha"] == pytest.approx(other["alpha"], rel=0.1)
    printed = fit(path, "--bootstraps", 60)
    assert "likelihood" not in printed
    assert printed.count(f"{plain['alpha']:.5g}") == 1
    assert "95 % profile likelihood" in fit(path, "--bootstraps", 60, "--other-methods")


def test_methods_that_disagree_are_named(tmp_path: Path) -> None:
    points = draw_grid(0)
    # One diverged run affects least squares more than the Huber loss.
    loss = np.where(np.arange(60) == 3, 2 * points.loss, points.loss)
    path = write(tmp_path / "points.csv", Points.of(points.params, points.tokens, loss))
    remarks = fit_json(path, "--bootstraps", 60, "--other-methods")["remarks"]
    assert [remark for remark in remarks if remark.startswith("Outside the law's intervals: ")]


def test_columns_and_runs_are_chosen_by_name(tmp_path: Path) -> None:
    points = draw_grid(0)
    path = write(tmp_path / "points.csv", points, id=[number // 3 for number in range(60)])
    text = path.read_text().replace("params,tokens", "Model Size,D")
    path.write_text(text.replace(",", ";"))
    tree = fit_json(path, "--bootstraps", 60, "--columns", "params=Model Size,tokens=D,run=id")
    assert (tree["n_points"], tree["n_runs"]) == (60, 20)
    assert tree["alpha"] == pytest.approx(fit_surface(points).surface.alpha, rel=1e-6)


def test_runs_that_repeat_their_data_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "points.csv", draw_grid(0), epochs=[1 + (number % 2) for number in range(60)])
    remarks = fit_json(path, "--bootstraps", 60)["remarks"]
    assert [remark for remark in remarks if remark.startswith("30 of 60 runs read their training data more")]


def test_largest_size_can_be_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "points.csv", draw_grid(0))
    tree = fit_json(path, "--bootstraps", 60, "--hold-out", "largest-size")["hold_out"]
    assert {run["params"] for run in tree["runs"]} == {5e9}
    inside = round(tree["share_inside_noise95"] * 12)
    printed = fit(path, "--bootstraps", 60, "--hold-out", "largest-size")
    assert (
        f"{inside} of 12 within 95 % intervals of the noise, which leave out the error of the law" in printed
    )


def test_variant_is_chosen_by_name(tmp_path: Path) -> None:
    points = draw_grid(0)
    both = Points.of(
        *(np.concatenate([values, values]) for values in (points.params, points.tokens)),
        np.concatenate([points.loss, 1.1 * points.loss]),
    )
    path = write(tmp_path / "points.csv", both, flops=False, variant=["mha"] * 60 + ["sas"] * 60)
    chosen = fit_json(path, "--variant", "sas", "--bootstraps", 60)
    assert chosen["n_points"] == 60
    assert chosen["E"] == pytest.approx(1.1 * fit_surface(points).surface.E, rel=1e-4)
    assert "--variant=None: a law is fitted to one variant, but the points contain mha, sas" in fit(
        path, status=2
    )


GOOD = "params,tokens,loss\n" + "".join(
    f"{n},{d},{CHINCHILLA.predict(np.array(n), np.array(d))}\n"
    for n in (1e7, 3e7, 9e7)
    for d in (1e9, 4e9, 16e9)
)
LINE = GOOD.splitlines()[4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            GOOD.replace(LINE, "1e7,1e9,nan"),
            "line 5: loss=nan: must be a positive number; remove diverged runs",
        ),
        (GOOD.replace(LINE, "1e7,1e9,-3.1"), "line 5: loss=-3.1: must be a positive number"),
        (GOOD.replace(LINE, "-1e7,1e9,3.1"), "line 5: params=-1e7: must be a positive number"),
        (GOOD.replace(LINE, "1e7,0,3.1"), "line 5: tokens=0: must be a positive number"),
        (GOOD.replace(LINE, "1e7,1e9"), "line 5: loss=nothing: must be a positive number"),
        (GOOD.replace(LINE, "1e7,1e9,low"), "line 5: loss=low: must be a positive number"),
        (
            GOOD.replace("loss\n", "perplexity\n"),
            "has no column loss; its first line must contain params,tokens,loss, and may contain flops, "
            "size, run, variant, epochs, but it contains params, tokens, perplexity; name its columns with",
        ),
        ("params,tokens,loss\n", "has no points"),
        ("", "has no column params, tokens, loss"),
        ("\n".join(GOOD.splitlines()[:3]), "points=2: the law has five parameters"),
        ("\n".join(GOOD.splitlines()[:2]), "points=1: the law has five parameters"),
        (GOOD.replace("30000000.0,", "10000001.0,").replace("90000000.0,", "10000002.0,"), "params=1 value"),
        (GOOD.replace(LINE, LINE.replace(".", ",")), "line 5, column 4: has "),
        (GOOD + LINE, "line 11: repeats line 5"),
    ],
    ids=[
        "NaN loss",
        "negative loss",
        "negative size",
        "no tokens",
        "no loss",
        "a word",
        "another column",
        "no points",
        "empty",
        "two points",
        "one point",
        "one size",
        "decimal commas",
        "a row twice",
    ],
)
def test_degenerate_points_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(text)
    done = CliRunner().invoke(cli, ["fit", str(path), "--json"])
    assert message in str(done.exception)
    assert done.stdout == ""


def test_valid_points_have_a_law(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text(GOOD)
    assert fit_json(tmp_path / "points.csv", "--bootstraps", 60)["alpha"] == pytest.approx(0.34, rel=1e-4)


def test_degenerate_points_exit_with_status_two(tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text("\n".join(GOOD.splitlines()[:3]))
    message = fit(tmp_path / "points.csv", "--json", status=2)
    assert message == (
        "sas-megatron: error: points=2: the law has five parameters and needs at least 6 points; add runs\n"
    )
    assert "cannot be read" in fit(tmp_path / "none.csv", status=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bootstraps", "10"], "--bootstraps=10: an interval needs at least 40"),
        (["--drop-highest", "-1"], "--drop-highest=-1: must be less than the number of points, 9"),
        (["--drop-highest", "9"], "--drop-highest=9: must be less than the number of points, 9"),
        (["--variant", "sas"], "--variant=sas: the points have no column variant"),
        (["--hold-out", "1"], "--hold-out=1: must be a fraction between 0 and 1 or largest-size; use"),
        (["--columns", "N=params"], "--columns=N=params: must assign a column of the table"),
        (["--columns", "loss=L"], "has no column L, it contains params, tokens, loss; name one of these"),
    ],
)
def test_invalid_option_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text(GOOD)
    done = CliRunner().invoke(cli, ["fit", str(tmp_path / "points.csv"), *arguments])
    assert message in str(done.exception)


@exhaustive
def test_fit_of_240_points_takes_seconds_and_1000_draws_less_than_a_minute(tmp_path: Path) -> None:
    path = write(tmp_path / "points.csv", draw_isoflops(0))
    before = resource.getrusage(resource.RUSAGE_SELF)
    fit_surface(draw_isoflops(0))
    after = resource.getrusage(resource.RUSAGE_SELF)
    # CPU time, since other load on the machine affects the wall-clock time.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < FIT_SECONDS
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "sas_megatron", "fit", str(path), "--bootstraps", "1000", "--json"]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=180, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{seconds:.1f} s")
    assert seconds < THOUSAND_BOOTSTRAPS_SECONDS


@exhaustive
def test_100_000_points_with_100_draws_take_two_minutes_and_one_gibibyte_at_most(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    params = np.exp(generator.uniform(np.log(1e7), np.log(1e10), 100_000))
    tokens = params * np.exp(generator.uniform(np.log(5), np.log(200), 100_000))
    loss = CHINCHILLA.predict(params, tokens) * np.exp(0.01 * generator.standard_normal(100_000))
    path = write(tmp_path / "points.csv", Points.of(params, tokens, loss), flops=False)
    command = [sys.executable, "-m", "sas_megatron", "fit", str(path), "--bootstraps", "100", "--json"]
    with (tmp_path / "law.json").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    seconds, gibibytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20
    print(f"{seconds:.1f} s, {gibibytes:.2f} GiB")
    assert seconds < 120
    assert gibibytes < 1
    law = json.loads((tmp_path / "law.json").read_text())
    assert law["alpha"] == pytest.approx(CHINCHILLA.alpha, abs=0.003)
