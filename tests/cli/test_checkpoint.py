"""`sas-megatron checkpoint verify`: what it says of sound and of damaged checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.test_manifest import write
from tests.cli.test_commands import command


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A run with three checkpoints."""
    for step in (5, 10, 15):
        write(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


@pytest.mark.parametrize("place", ["", "checkpoints"])
def test_all_checkpoints_of_a_run_are_verified(run_directory: Path, place: str) -> None:
    done = command("checkpoint", "verify", run_directory / place, folder=run_directory)
    assert done.returncode == 0, done.stderr
    folder = run_directory / "checkpoints"
    assert done.stdout.splitlines() == [
        f"{folder / 'iter_0000005'}: 2 files, 392 bytes, as written at step 5",
        f"{folder / 'iter_0000010'}: 2 files, 396 bytes, as written at step 10",
        f"{folder / 'iter_0000015'}: 2 files, 400 bytes, as written at step 15",
    ]


def test_damage_is_printed_and_ends_with_status_2(run_directory: Path) -> None:
    path = run_directory / "checkpoints" / "iter_0000010"
    (path / "weights").write_bytes((path / "weights").read_bytes()[:-1])
    (path / "deeper" / "more").unlink()
    message = f"{path}: is damaged: deeper/more is missing; weights has 197 bytes, 198 were written; put"
    one = command("checkpoint", "verify", path, folder=run_directory)
    assert (one.returncode, one.stdout) == (2, "")
    assert one.stderr.startswith(f"sas-megatron: error: {message}")
    both = command("checkpoint", "verify", run_directory, folder=run_directory)
    assert both.returncode == 2
    first, second, third = both.stdout.splitlines()
    assert first.endswith("as written at step 5")
    assert second.startswith(message)
    assert third.endswith("as written at step 15")
    assert both.stderr.startswith(
        f"sas-megatron: error: {run_directory}: holds damaged checkpoints: iter_0000010; put it back"
    )


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    done = command("checkpoint", "verify", tmp_path / "nothing", folder=tmp_path)
    assert done.returncode == 2
    assert "nothing: is no folder; give a checkpoint, such as run/checkpoints/iter_0001000" in done.stderr
    assert "Traceback" not in done.stderr
