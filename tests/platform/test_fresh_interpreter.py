"""The platform in an interpreter that has not imported Megatron-core."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import ROOT

MEBIBYTE = 2**20
LAUNCHER_BYTES = 700 * MEBIBYTE


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Return the results of the functions in `tests.platform.fresh_interpreter`, by name."""
    allocated = b"\1" * LAUNCHER_BYTES  # not zeros, which would not become resident
    command = [sys.executable, "-m", "tests.platform.fresh_interpreter"]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    del allocated
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


def test_peak_memory_excludes_the_memory_of_the_launcher(results: dict[str, Any]) -> None:
    assert 50 * MEBIBYTE < results["peak_memory"] < LAUNCHER_BYTES


def test_install_changes_nothing_on_a_machine_with_cuda(results: dict[str, Any]) -> None:
    assert results["install_with_cuda"] == {
        "installed": False,
        "unknown": [],
        "changed": [],
        "modes": 0,
        "imports_megatron": False,
    }


def test_a_rank_uses_the_gpu_of_its_local_rank(results: dict[str, Any]) -> None:
    assert results["last_gpu"] == ["cuda:3", "cuda:3", "nccl"]


def test_a_local_rank_beyond_the_gpus_of_its_node_is_rejected(results: dict[str, Any]) -> None:
    (error,) = results["beyond_the_gpus"]
    assert error.startswith(
        "LOCAL_RANK=4: must be below the number of GPUs of this node, 4; start one process per GPU"
    )
