"""No module imports another in a circle, deferred and type-only imports included."""

from __future__ import annotations

from pathlib import Path

from tests.architecture.import_graph import find_cycles, read_imports
from tests.conftest import ROOT


def test_no_modules_import_each_other() -> None:
    graph = read_imports(ROOT, "sas_megatron")
    assert "sas_megatron.config.attention" in graph["sas_megatron.attention.sas.config"]
    assert find_cycles(graph) == []


def test_deferred_and_type_only_imports_close_a_cycle(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "__init__.py").write_text("")
    (package / "first.py").write_text("from package.second import x\n")
    (package / "second.py").write_text("def f():\n    from package import third\n    return third\n")
    (package / "third.py").write_text(
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from .inner.fourth import x\n"
    )
    (package / "inner" / "fourth.py").write_text("from .. import first\n")
    (package / "inner" / "fifth.py").write_text("import package.first\n")
    assert find_cycles(read_imports(tmp_path, "package")) == [
        ["package.first", "package.inner.fourth", "package.second", "package.third"]
    ]
