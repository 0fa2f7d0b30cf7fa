"""A newcomer's path through the code: five short files that the documentation explains."""

from __future__ import annotations

import ast
import re
import sys

from tests.docs.pages import ROOT, read_page

FILES = (
    "configs/quickstart_sas.yaml",
    "sas_megatron/attention/sas/simulated_attention.py",
    "sas_megatron/attention/sas/layer.py",
    "sas_megatron/training/step.py",
    "sas_megatron/training/loop.py",
)
MAX_LINES = 900
MAX_SAS_FILES = 12
PAGE = ROOT / "docs" / "reading_the_code.md"


def test_the_files_of_the_reading_path_are_short() -> None:
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    assert sum(lines.values()) <= MAX_LINES, lines


def test_the_page_lists_the_files_in_reading_order() -> None:
    table = read_page(PAGE).partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)) == FILES
    assert f"at most {MAX_LINES} lines" in table


def test_the_page_lists_the_few_files_of_sas() -> None:
    section = read_page(PAGE).partition("## The files of SAS")[2].partition("\n## ")[0]
    folder = ROOT / "sas_megatron" / "attention" / "sas"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.py") if path.name != "__init__.py"}
    files.add("sas_megatron/distributed/gradient_sums.py")
    assert len(files) <= MAX_SAS_FILES
    rows = re.findall(r"^\| (`.+?`) \|", section, flags=re.MULTILINE)
    assert set(re.findall(r"`([^`]+)`", " ".join(rows))) == files


def test_the_operator_imports_torch_only() -> None:
    tree = ast.parse((ROOT / FILES[1]).read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "torch" in imported
    assert imported <= {"torch", *sys.stdlib_module_names}


def test_the_sum_of_gradients_can_be_found_from_the_path() -> None:
    """The page names the function that sums the gradients of simulation weights; the layer calls it."""
    assert "sum_gradients_over" in read_page(PAGE)
    assert "sum_gradients_over" in (ROOT / FILES[2]).read_text(encoding="utf-8")
