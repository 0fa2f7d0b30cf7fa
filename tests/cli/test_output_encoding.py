"""Commands print what they have computed on outputs of any encoding: unencodable characters are escaped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_fit import write
from tests.conftest import ROOT
from tests.scaling.synthetic import draw_grid
from tests.selection import cases
from tests.small_data import SmallData

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENCODINGS: dict[str, dict[str, str]] = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C locale": C_LOCALE,
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "strict ascii": {"PYTHONIOENCODING": "ascii:strict"},
}


def run(
    *arguments: object, cwd: Path, environment: dict[str, str], status: int = 0
) -> subprocess.CompletedProcess[bytes]:
    """Run a command with its own output encoding, which a forked process cannot have."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sas_megatron",
            *(each if isinstance(each, bytes) else str(each) for each in arguments),
        ],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("name", cases(ENCODINGS, default=["ascii", "C locale"]))
def test_a_fit_is_printed(tmp_path: Path, name: str) -> None:
    table = write(tmp_path / "points.csv", draw_grid(0))
    output = run("fit", table, "--bootstraps", 40, cwd=tmp_path, environment=ENCODINGS[name]).stdout
    assert b"L(N, D) = E + A/N^\\u03b1 + B/D^\\u03b2 through 60 points" in output
    if name != "latin-1":
        assert output.isascii()


@pytest.mark.parametrize("name", cases(ENCODINGS, default=["ascii"]))
def test_a_document_is_shown_without_loss(small_data: SmallData, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("Grüße … 数", encoding="utf-8")
    prepare = ("data", "prepare", "text.txt", "--tokenizer", small_data.tokenizer, "--output", "tokens")
    run(*prepare, "--workers", 1, cwd=tmp_path, environment=ENCODINGS[name])
    output = run("data", "inspect", "tokens", cwd=tmp_path, environment=ENCODINGS[name]).stdout
    encoded = "Grüße … 数".encode("latin-1" if name == "latin-1" else "ascii", "backslashreplace")
    # click encodes as UTF-8 what it prints itself on an output that claims to be ASCII.
    assert encoded in output or "Grüße … 数".encode() in output


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "utf-8"}, C_LOCALE])
def test_a_name_that_is_not_utf8_is_printed_in_a_message(tmp_path: Path, environment: dict[str, str]) -> None:
    done = run("costs", b"names\xff.yaml", cwd=tmp_path, environment=environment, status=2)
    assert b"names\\udcff.yaml: cannot be read" in done.stderr
    path = os.fsencode(tmp_path) + b"/names\xff.yaml"
    with open(ROOT / "configs/quickstart_mha.yaml", "rb") as shipped, open(path, "wb") as copy:
        copy.write(shipped.read())
    assert b"names\\udcff" in run("costs", path, cwd=tmp_path, environment=environment).stdout


def test_output_of_other_programs_need_not_be_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sas_megatron.platform.local_machine import count_gpus

    program = tmp_path / "nvidia-smi"
    program.write_bytes(b"#!/bin/sh\nprintf 'GPU 0: caf\\351\\nGPU 1: caf\\351\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert count_gpus() == 2
