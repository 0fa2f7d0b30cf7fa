"""A refusal prints a command line that is not refused."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from sas_megatron.cli.suggested_command import suggest_command
from sas_megatron.config.errors import FieldError, UserError, WorldSizeError
from tests.conftest import ROOT
from tests.data.test_mock_data import WITHOUT_CORPUS
from tests.end_to_end.started_processes import environment_with
from tests.fork_server import run_command


def suggestion(stderr: str) -> list[str]:
    """Return the words of the suggested command, which is the last line."""
    start, line = "sas-megatron: try: ", stderr.splitlines()[-1]
    assert line.startswith(start), stderr
    return shlex.split(line.removeprefix(start))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run.yaml").write_text(WITHOUT_CORPUS)
    return tmp_path


def test_a_repeated_command_is_refused_with_the_command_that_resumes(folder: Path) -> None:
    command = ["train", "run.yaml", "--mock-data", "training.stop_after_steps=2", "data.split=[0.9, 0.1]"]
    assert run_command(*command, cwd=folder).returncode == 0
    refused = run_command(*command, cwd=folder)
    assert refused.returncode == 2
    program, *words = suggestion(refused.stderr)
    assert (program, words) == ("sas-megatron", [*command, "checkpoint.resume=auto"])
    assert run_command(*words, cwd=folder).returncode == 0
    # Another value than that of the run is refused with the command that restores it.
    changed = run_command(*words, "optimizer.learning_rate=0.5", cwd=folder)
    assert changed.returncode == 2
    assert suggestion(changed.stderr)[1:] == [*words, "optimizer.learning_rate=0.01"]
    assert run_command(*suggestion(changed.stderr)[1:], cwd=folder).returncode == 0


def test_a_refused_combination_prints_a_command_that_passes(folder: Path) -> None:
    command = ["train", "--check", "run.yaml", "parallel.sequence=true", "--mock-data"]
    refused = run_command(*command, cwd=folder)
    assert refused.returncode == 2
    words = suggestion(refused.stderr)
    assert words == ["sas-megatron", "train", "--check", "run.yaml", "--mock-data", "parallel.sequence=false"]
    assert run_command(*words[1:], cwd=folder).returncode == 0


def test_a_launch_script_prints_its_own_command(folder: Path) -> None:
    command = ["launch/torchrun.sh", "3", str(folder / "run.yaml"), "--mock-data"]
    environment = environment_with(XDG_CACHE_HOME=str(folder / "cache"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert suggestion(done.stderr) == ["launch/torchrun.sh", "2", *command[2:]]


ERRORS = {
    "fix": FieldError("a.b", 1, "rule", "remedy", ("a.b=2", "c.d=null")),
    "none": FieldError("a.b", 1, "rule", "remedy"),
    "user error": UserError("text"),
    "world size": WorldSizeError("world size", 3, "rule", "remedy", 4),
}


@pytest.mark.parametrize(
    ("error", "argv", "environment", "expected"),
    [
        (
            "fix",
            ["train", "x y.yaml", "a.b=1", "e.f=1"],
            {},
            "sas-megatron train 'x y.yaml' e.f=1 a.b=2 c.d=null",
        ),
        ("fix", ["study", "plan", "s.yaml"], {}, None),
        ("none", ["train", "x.yaml"], {}, None),
        ("user error", ["train", "x.yaml"], {}, None),
        ("fix", ["train", "x.yaml"], {"LOCAL_RANK": "0"}, None),
        (
            "fix",
            ["train", "--check", "x.yaml"],
            {"SAS_MEGATRON_COMMAND": "launch/torchrun.sh 8 x.yaml a.b=1 ", "LOCAL_RANK": "0"},
            "launch/torchrun.sh 8 x.yaml a.b=2 c.d=null",
        ),
        (
            "world size",
            ["train", "x.yaml"],
            {},
            "torchrun --standalone --nproc-per-node 4 -m sas_megatron train x.yaml",
        ),
        (
            "world size",
            ["train", "--check", "x.yaml"],
            {"SAS_MEGATRON_COMMAND": "launch/torchrun.sh x.yaml"},
            "launch/torchrun.sh 4 x.yaml",
        ),
        ("world size", ["train", "x.yaml"], {"NNODES": "2"}, None),
    ],
)
def test_the_suggested_command(
    error: str,
    argv: list[str],
    environment: dict[str, str],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("LOCAL_RANK", "SAS_MEGATRON_COMMAND", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["sas-megatron", *argv])
    assert suggest_command(ERRORS[error]) == expected
