"""The options of the test command select the documented tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.measured_run import FILE_COSTS
from tests.selection import cases, exhaustive, parse_part

FILES = {
    "test_first.py": (
        "from tests.selection import exhaustive\n@exhaustive\ndef test_long(): pass\ndef test_short(): pass\n"
    ),
    "test_second.py": (
        "from tests.selection import cases, draws\nimport pytest\n"
        "@pytest.mark.parametrize('name', cases(['a', 'b', 'c'], default=['b']))\n"
        "def test_table(name): pass\n"
        "@draws(3, 40)\ndef test_claim(num_draws): pass\n"
    ),
    "test_third.py": "def test_one(): pass\ndef test_two(): pass\n",
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    for name, source in FILES.items():
        (folder / name).write_text(source)
    return folder


def run(suite: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with this project's conftest on the files in `suite`."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            "pyproject.toml",
            "-p",
            "tests.conftest",
            "-rp",
            *options,
            suite,
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def passed(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return {line.split("::")[1] for line in done.stdout.splitlines() if line.startswith("PASSED ")}


DEFAULT = {"test_short", "test_table[b]", "test_claim[3]", "test_one", "test_two"}
ALL = {*DEFAULT, "test_long", "test_table[a]", "test_table[c]", "test_claim[40]"}


def test_the_default_run_omits_and_counts_exhaustive_tests(suite: Path) -> None:
    done = run(suite)
    assert passed(done) == DEFAULT
    assert "4 tests run only with tests/run.sh --all" in done.stdout
    assert "skipped" not in done.stdout


def test_parts_are_disjoint_and_cover_all_tests(suite: Path) -> None:
    complete = run(suite, "--all")
    assert passed(complete) == ALL
    assert "run only with" not in complete.stdout
    first, second = (passed(run(suite, "--all", "--part", part)) for part in ("1/2", "2/2"))
    assert not first & second
    assert first | second == ALL


def test_workers_report_costs_and_omitted_tests_once(suite: Path, tmp_path: Path) -> None:
    costs = tmp_path / "costs"
    done = run(suite, "-n", "2", "--dist", "loadfile", **{FILE_COSTS: str(costs)})
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("4 tests run only with tests/run.sh --all") == 1
    recorded = [Path(json.loads(line)["file"]).name for line in costs.read_text().splitlines()]
    assert sorted(recorded) == sorted(FILES)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", ""])
def test_an_invalid_part_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="must be i/n with 1 <= i <= n"):
        parse_part(text)


def test_a_default_case_must_be_in_the_table() -> None:
    with pytest.raises(ValueError, match="the table has no case d"):
        cases(["a", "b"], default=["d"])
    marked, default = cases(["a", "b"], default=["b"])
    assert (marked.values, list(marked.marks), default) == (("a",), [exhaustive], "b")


def test_help_and_invalid_parts_are_reported_before_any_installation(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "SAS_MEGATRON_VENV": str(tmp_path / "venv")}
    for options, status, text in (
        (["--help"], 0, "usage: tests/run.sh"),
        (["--all", "--part", "3/2"], 2, "--part 3/2: must be I/N with 1 <= I <= N"),
        (["--part", "1/2"], 2, "is a part of --all"),
        (["--all", "--part"], 2, "--part needs I/N"),
    ):
        done = subprocess.run(
            ["tests/run.sh", *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=10
        )
        assert done.returncode == status
        assert text in done.stdout + done.stderr
    assert not (tmp_path / "venv").exists()
