"""`sas-megatron checkpoint verify` on intact and damaged checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.test_manifest import write
from tests.cli.test_commands import command


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """Return a run directory with three checkpoints."""
    for step in (5, 10, 15):
        write(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


@pytest.mark.parametrize("subfolder", ["", "checkpoints"])
def test_all_checkpoints_of_a_run_are_verified(run_directory: Path, subfolder: str) -> None:
    done = command("checkpoint", "verify", run_directory / subfolder, folder=run_directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "iter_0000005: intact, step 5, 5 files, 466 bytes",
        "iter_0000010: intact, step 10, 5 files, 473 bytes",
        "iter_0000015: intact, step 15, 5 files, 477 bytes",
    ]


def test_damaged_checkpoints_are_printed_and_the_status_is_2(run_directory: Path) -> None:
    path = run_directory / "checkpoints" / "iter_0000010"
    (path / "weights").write_bytes((path / "weights").read_bytes()[:-1])
    (path / "deeper" / "more").unlink()
    message = f"{path}: is damaged: deeper/more is missing; weights has 197 bytes, but 198 were written;"
    of_checkpoint = command("checkpoint", "verify", path, folder=run_directory)
    assert (of_checkpoint.returncode, of_checkpoint.stdout) == (2, "")
    assert of_checkpoint.stderr.startswith(f"sas-megatron: error: {message}")
    of_run = command("checkpoint", "verify", run_directory, folder=run_directory)
    assert of_run.returncode == 2
    first, second, third = of_run.stdout.splitlines()
    assert first.endswith("intact, step 5, 5 files, 466 bytes")
    assert second.startswith(message)
    assert third.endswith("intact, step 15, 5 files, 477 bytes")
    assert of_run.stderr.startswith(
        f"sas-megatron: error: {run_directory}: contains damaged checkpoints: iter_0000010; restore them"
    )


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    done = command("checkpoint", "verify", tmp_path / "nothing", folder=tmp_path)
    assert done.returncode == 2
    assert (
        "nothing: is not a folder; name a checkpoint, for example run/checkpoints/iter_0001000" in done.stderr
    )
    assert "Traceback" not in done.stderr
