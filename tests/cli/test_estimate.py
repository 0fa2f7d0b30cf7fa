"""The command `sas-megatron estimate`: errors, JSON output and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_commands import QUICKSTART, check_refused
from tests.fork_server import run_command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--world-size", 2, "--hardware", "h900"],
            "hardware 'h900': is neither a shipped name nor a file; use a100, h100, h200, this-machine, or "
            "the path of a hardware file",
        ),
        (["--world-size", 0], "world size=0: must be positive; use 1 or more"),
        (
            ["--world-size", 2, "--search", "--validate"],
            "--search and --validate: exclude each other; use one of them",
        ),
        (
            ["--world-size", 2, "training.engine=deepspeed"],
            "training.engine=deepspeed: cannot be estimated yet; set training.engine=megatron",
        ),
    ],
)
def test_runs_that_cannot_be_estimated_are_errors(arguments: list[Any], message: str, tmp_path: Path) -> None:
    check_refused(run_command("estimate", QUICKSTART, *arguments, cwd=tmp_path), message, tmp_path)


def test_a_world_size_that_does_not_fit_the_layout_is_an_error(tmp_path: Path) -> None:
    done = run_command("estimate", QUICKSTART, "--world-size", 3, cwd=tmp_path)
    assert done.returncode == 2
    assert "world size=3: must be a multiple of 2, the ranks of one model (parallel.tensor=2)" in done.stderr


def test_the_old_name_of_the_command_is_an_error_that_names_the_new_one(tmp_path: Path) -> None:
    message = "command simulate: has been renamed; use sas-megatron estimate"
    check_refused(run_command("simulate", QUICKSTART, "--world-size", 2, cwd=tmp_path), message, tmp_path)


def _terms_sum(step: dict[str, Any]) -> float:
    return sum(step["seconds_by_term"].values())


def test_the_estimate_is_printed_as_an_object_or_as_tables(tmp_path: Path) -> None:
    # The files of the config's data section do not exist.
    small = ["model.num_layers=2", "parallel.pipeline=2", "--world-size", 4]
    done = run_command("estimate", QUICKSTART, *small, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    estimate = json.loads(done.stdout)
    assert [rank["rank"] for rank in estimate["ranks"]] == [0, 2]
    for rank in estimate["ranks"]:
        assert rank["layers"] == 1
        assert rank["attended_heads"] == 4
        static = sum(rank[f"{name}_bytes"] for name in ("parameter", "gradient", "optimizer"))
        assert rank["peak_bytes"] == static + rank["peak_activation_bytes"]
        assert {"tensor", "pipeline"} <= set(rank["communication_bytes_sent"])
    step = estimate["step"]
    assert step["seconds"] == pytest.approx(_terms_sum(step))
    assert {"compute", "tensor", "pipeline", "bubble"} <= set(step["seconds_by_term"])
    assert step["pipeline_bubble"] == 1.0  # two stages, one microbatch
    assert estimate["fits"] is True

    table = run_command("estimate", QUICKSTART, *small, "--rank", 3, "--memory-gib", 2.5, cwd=tmp_path)
    assert table.returncode == 0, table.stderr
    assert "rank 3" in table.stdout
    assert "does not fit" in table.stdout
    assert "pipeline bubble" in table.stdout
