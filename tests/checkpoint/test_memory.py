"""Saving and loading take little memory beside what they save and load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

# A tensor of 4 MB or two, and what Python and the C library take for themselves.
SOME_TENSORS_BYTES = 16_000_000


def test_neither_a_save_nor_a_load_holds_the_states_twice(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.checkpoint_memory", tmp_path],
        cwd=ROOT,
        # Memory that is freed is given back at once, so that what is resident is what is held.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    assert taken["states"] > 190_000_000
    assert taken["save"] < SOME_TENSORS_BYTES, taken
    assert taken["load"] < SOME_TENSORS_BYTES, taken
    # The one copy that training goes on beside.
    assert taken["states"] * 0.9 < taken["asynchronous_save"] < taken["states"] + SOME_TENSORS_BYTES, taken
