"""The code base passes its linters, formatter and type checker, and keeps its import and size limits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sas_megatron"
LONGEST_FILE_LINES = 350

# Modules that the command line imports without torch, which takes seconds to import.
WITHOUT_TORCH = [
    *sorted((PACKAGE / "config").glob("*.py")),
    *sorted((PACKAGE / "io").glob("*.py")),
    *sorted((PACKAGE / "scaling").rglob("*.py")),
    *sorted((PACKAGE / "costs").rglob("*.py")),
    *(
        PACKAGE / "checkpoint" / name
        for name in (
            "__init__.py",
            "manifest.py",
            "weights_source.py",
        )
    ),
    *(
        PACKAGE / "evaluation" / name
        for name in (
            "__init__.py",
            "model_source.py",
            "settings.py",
        )
    ),
    *(PACKAGE / "platform" / name for name in ("__init__.py", "launcher.py", "local_machine.py")),
    *(PACKAGE / "preflight" / name for name in ("__init__.py", "finding.py", "network.py", "node.py")),
    *(
        PACKAGE / "planning" / name
        for name in ("__init__.py", "hardware_file.py", "step_estimate.py", "workload.py")
    ),
    *(PACKAGE / "attention" / name for name in ("__init__.py", "sas/tensor_parallel.py")),
    *(
        path
        for variant in ("diff", "gqa", "mfa", "mla", "sas", "tpa")
        for path in (
            PACKAGE / "attention" / variant / name for name in ("__init__.py", "config.py", "costs.py")
        )
    ),
]


def assert_passes(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_imports_satisfy_the_contracts() -> None:
    assert_passes(str(Path(sys.executable).with_name("lint-imports")))


def test_the_linter_reports_no_problems() -> None:
    assert_passes(sys.executable, "-m", "ruff", "check", ".")
    # A rule of ruff's preview: without an encoding, a file is read and written in that of the locale.
    assert_passes(sys.executable, "-m", "ruff", "check", "--preview", "--select", "PLW1514", "sas_megatron")


def test_every_file_is_formatted() -> None:
    assert_passes(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_the_type_checker_reports_no_problems() -> None:
    assert_passes(sys.executable, "-m", "mypy")


def test_configs_costs_and_comparisons_import_no_torch() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in WITHOUT_TORCH
    ]
    script = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    heavy = {'torch', 'megatron', 'deepspeed'} & set(sys.modules)\n"
        "    assert not heavy, f'{module} imports {heavy}'\n"
    )
    assert_passes(sys.executable, "-c", script)


@pytest.mark.parametrize("folder", ["sas_megatron", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE_LINES}


def test_no_module_has_an_uninformative_name() -> None:
    uninformative = {"utils", "common", "helpers", "misc"}
    assert not {path for path in PACKAGE.rglob("*") if path.stem in uninformative}
