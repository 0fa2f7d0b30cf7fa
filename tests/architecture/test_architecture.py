"""The shape of the code base: imports, size of files, and what linter, formatter and type checker say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "sas_megatron"
LONGEST_FILE_LINES = 400

# What may be read and computed on a machine without torch, at the speed of a command line.
WITHOUT_TORCH = [
    *sorted((PACKAGE / "config").glob("*.py")),
    *sorted((PACKAGE / "scaling").rglob("*.py")),
    *sorted((PACKAGE / "costs").rglob("*.py")),
    *(
        PACKAGE / "checkpoint" / name
        for name in (
            "__init__.py",
            "architecture.py",
            "manifest.py",
            "weights_record.py",
            "weights_source.py",
        )
    ),
    *(
        PACKAGE / "evaluation" / name
        for name in (
            "__init__.py",
            "generation_settings.py",
            "start.py",
            "task_settings.py",
            "window_settings.py",
        )
    ),
    *(PACKAGE / "platform" / name for name in ("__init__.py", "launcher.py", "local_machine.py")),
    *(PACKAGE / "preflight" / name for name in ("__init__.py", "finding.py", "network.py", "node.py")),
    *(
        PACKAGE / "planning" / name
        for name in ("__init__.py", "hardware_file.py", "step_estimate.py", "tally.py")
    ),
    *(
        PACKAGE / "attention" / name
        for name in (
            "__init__.py",
            "gqa/__init__.py",
            "gqa/config.py",
            "mfa/__init__.py",
            "mfa/config.py",
            "mla/__init__.py",
            "mla/config.py",
            "sas/__init__.py",
            "sas/activations.py",
            "sas/config.py",
            "sas/exchange_choice.py",
            "shared_heads.py",
            "tpa/__init__.py",
            "tpa/config.py",
        )
    ),
]


def passes(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_imports_keep_the_contracts() -> None:
    passes(str(Path(sys.executable).with_name("lint-imports")))


def test_the_linter_finds_nothing() -> None:
    passes(sys.executable, "-m", "ruff", "check", ".")


def test_every_file_is_formatted() -> None:
    passes(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_types_check_strictly() -> None:
    passes(sys.executable, "-m", "mypy")


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
    passes(sys.executable, "-c", script)


@pytest.mark.parametrize("folder", ["sas_megatron", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / folder).rglob("*.py")
    }
    assert lengths
    assert not {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE_LINES}


def test_no_package_is_named_for_nothing() -> None:
    empty_names = {"utils", "common", "helpers", "misc"}
    assert not {path for path in PACKAGE.rglob("*") if path.stem in empty_names}
