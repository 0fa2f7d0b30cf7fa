"""Shared memory and instructions of the compiled kernels on H100 and H200, which the interpreter lacks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.kernel_choice import SHARED_MEMORY_BYTES, count_shared_memory_bytes
from tests.selection import exhaustive

# N, r, D, E and k of configs/1.3b/sas.yaml.
SIZES = (16, 3, 128, 192, 3)
# The kernels that need the most shared memory, by which the fused form is chosen or not.
LARGEST = ("head_backward", "feature_backward")
OTHERS = (
    "head_forward",
    "head_refine_gradient",
    "feature_forward",
    "expand_gradient",
    "refine_gradient",
)


@pytest.mark.parametrize(
    "names", [LARGEST, pytest.param(OTHERS, marks=exhaustive)], ids=["largest", "others"]
)
def test_kernels_fit_on_chip_and_use_its_matrix_units(names: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.fused.compilation", *map(str, SIZES), *names],
        cwd=Path(__file__).parents[3],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert set(kernels) == set(names)
    for name, taken in kernels.items():
        assert taken["shared_memory_bytes"] <= SHARED_MEMORY_BYTES, name
        assert taken["matrix_instructions"] > 0, name
    # What decides between the fused and the plain form is what the compiler takes, and little more.
    fields = ("num_heads", "head_expansion", "head_dim", "simulated_head_dim", "kernel_size")
    counted = count_shared_memory_bytes(SimulatedAttentionConfig(**dict(zip(fields, SIZES, strict=True))))
    for what, kernel in zip(("head simulation", "feature simulation"), LARGEST, strict=True):
        if kernel not in kernels:
            continue
        taken = kernels[kernel]["shared_memory_bytes"]
        assert 0.8 * counted[what] <= taken <= counted[what], (what, taken, counted[what])
