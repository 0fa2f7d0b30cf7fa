"""The compiled kernels fit into the shared memory of H100 and H200, and use their matrix instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sas_megatron.attention.sas.config import SimulatedAttentionConfig
from sas_megatron.attention.sas.costs import count_shared_memory_bytes
from sas_megatron.costs.kernel_tiles import SHARED_MEMORY_BYTES
from tests.conftest import ROOT
from tests.selection import exhaustive

# N, r, D, E and k of configs/1.3b/sas.yaml.
SIZES = (16, 3, 128, 192, 3)
# The kernels that need the most shared memory, which decide whether the fused kernels are used.
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
def test_kernels_fit_on_chip_and_use_matrix_instructions(names: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.fused.compilation", *map(str, SIZES), *names],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert set(kernels) == set(names)
    for name, used in kernels.items():
        assert used["shared_memory_bytes"] <= SHARED_MEMORY_BYTES, name
        assert used["matrix_instructions"] > 0, name
    # The count that decides between fused and plain kernels is at least the compiler's, and not much larger.
    fields = ("num_heads", "head_expansion", "head_dim", "simulated_head_dim", "kernel_size")
    counted = count_shared_memory_bytes(SimulatedAttentionConfig(**dict(zip(fields, SIZES, strict=True))))
    for simulation, kernel in zip(("head simulation", "feature simulation"), LARGEST, strict=True):
        if kernel not in kernels:
            continue
        used_bytes = kernels[kernel]["shared_memory_bytes"]
        assert 0.8 * counted[simulation] <= used_bytes <= counted[simulation], (simulation, used_bytes)
