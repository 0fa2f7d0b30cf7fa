"""What the platform does in an interpreter that has imported nothing of Megatron-core."""

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
    """By name, the results of the functions of `tests.platform.fresh_interpreter`."""
    held = b"\1" * LAUNCHER_BYTES  # resident, as zeros would not be
    command = [sys.executable, "-m", "tests.platform.fresh_interpreter"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    del held
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_peak_memory_leaves_out_what_the_launcher_held(results: dict[str, Any]) -> None:
    assert 50 * MEBIBYTE < results["peak_memory"] < LAUNCHER_BYTES


def test_a_machine_with_cuda_is_left_untouched(results: dict[str, Any]) -> None:
    assert results["install_beside_cuda"] == {
        "installed": False,
        "unknown": [],
        "changed": [],
        "modes": 0,
        "imports_megatron": False,
    }


def test_a_rank_uses_the_gpu_of_its_local_rank(results: dict[str, Any]) -> None:
    assert results["last_gpu"] == ["cuda:3", "cuda:3", "nccl"]


def test_a_rank_beyond_the_gpus_of_its_node_is_refused(results: dict[str, Any]) -> None:
    (error,) = results["beyond_the_gpus"]
    assert error.startswith("LOCAL_RANK=4: is beyond the 4 GPUs of this node; start one process a GPU")
