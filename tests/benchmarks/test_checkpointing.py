"""The checkpoint benchmark compares a save with a copy in memory and with `dd`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.fork_server import run_command


def test_a_save_is_compared_with_a_copy_and_with_dd_and_its_files_are_removed(tmp_path: Path) -> None:
    done = run_command("bench", "checkpoint", "--gigabytes", "0.04", "--repeats", "1", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bytes"] == 40_000_000
    assert all(seconds > 0 for seconds in result["seconds"].values())
    (blocked, copy), (dd, save) = (
        (result["seconds"][name] for name in names) for names in (("blocked", "copy"), ("dd", "save"))
    )
    assert result["blocked_over_copy"] == blocked / copy
    assert result["save_rate_over_dd"] == dd / save
    assert result["hashing_exposed"] == (save - result["seconds"]["unhashed"]) / save
    assert not list(tmp_path.iterdir())
