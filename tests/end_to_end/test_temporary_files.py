"""Processes that torchrun starts leave nothing among the temporary files."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from sas_megatron.config.loading import dump_yaml
from sas_megatron.platform.local_machine import training_command
from tests.conftest import ROOT
from tests.selection import cases, exhaustive
from tests.small_data import SmallData

TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node", "2")


def run(folder: Path, *command: str) -> tuple[int, list[str]]:
    """Run a command whose temporary files are in `folder`; return its status and the paths that it leaves."""
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    left = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    return done.returncode, [path for path in left if not path.startswith("torchinductor")]


@pytest.mark.parametrize(
    ("config", "status"), cases([("quickstart_mha", 0), ("none", 1)], default=[("quickstart_mha", 0)])
)
def test_a_command_under_torchrun_removes_the_folder_of_logs(
    tmp_path: Path, config: str, status: int
) -> None:
    arguments = ("-m", "sas_megatron", "costs", f"configs/{config}.yaml")
    assert run(tmp_path / "tmp", *TORCHRUN, *arguments) == (status, [])


@exhaustive
def test_logs_that_the_user_asked_for_stay(tmp_path: Path) -> None:
    command = (*TORCHRUN, "--redirects", "3", "-m", "sas_megatron", "costs", "configs/quickstart_mha.yaml")
    status, left = run(tmp_path / "tmp", *command)
    assert status == 0
    assert sorted(path.split("/")[-2:] for path in left if path.endswith(".log")) == [
        [rank, name] for rank in "01" for name in ("stderr.log", "stdout.log")
    ]


def test_runs_of_a_study_start_torchrun_without_a_folder_of_logs() -> None:
    command = training_command(Path("run.yaml"), ranks=2)
    assert command[command.index("--log-dir") + 1] == os.devnull


@exhaustive
@pytest.mark.parametrize("launcher", ["script", "study"])
def test_training_leaves_no_temporary_files(small_data: SmallData, tmp_path: Path, launcher: str) -> None:
    config = small_data.run(tmp_path / "run", training={"num_steps": 4}, parallel={"tensor": 2})
    (tmp_path / "run.yaml").write_text(dump_yaml(config))
    command = training_command(tmp_path / "run.yaml", ranks=2)
    if launcher == "script":
        command = ["launch/torchrun.sh", "2", str(tmp_path / "run.yaml")]
    assert run(tmp_path / "tmp", *command) == (0, [])
    assert (tmp_path / "run" / "summary.json").exists()
