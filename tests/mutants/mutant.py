"""One fault, and how it is applied to the source."""

from __future__ import annotations

import ast
import functools
import subprocess
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


class NotApplicable(ValueError):
    """A fault does not apply to the current source; its definition must be updated."""


@dataclass(frozen=True)
class Mutant:
    """A fault of one line.

    Args:
        name: Unique, for the command line and the results.
        function: `module:function`, where the function may be a method or a class by its dotted name; for a
            launch script, its path.
        text: The replaced text, which must occur exactly once in the source of the function.
        replacement: The new text.
        fault: The resulting fault, in one sentence.
    """

    name: str
    function: str
    text: str
    replacement: str
    fault: str

    @property
    def is_script(self) -> bool:
        """Whether the fault is in a launch script."""
        return ":" not in self.function

    @property
    def path(self) -> Path:
        """The mutated file, relative to the checkout."""
        if self.is_script:
            return Path(self.function)
        return Path(self.function.partition(":")[0].replace(".", "/") + ".py")

    @property
    def package(self) -> str:
        """The subpackage of `sas_megatron`, or `launch`."""
        return self.path.parts[0] if self.is_script else self.path.parts[1]

    def mutate(self, source: str) -> str:
        """Return the source of the file with the fault.

        Raises:
            NotApplicable: The function is absent, the text does not occur exactly once in it, or the result
                does not compile or is the same program.
        """
        begin, end = (0, len(source)) if self.is_script else self._find_function(source)
        original = source[begin:end]
        count = original.count(self.text)
        if count != 1:
            raise NotApplicable(f"{self.name}: {self.text!r} occurs {count} times in {self.function}")
        mutated = original.replace(self.text, self.replacement)
        (self._check_script if self.is_script else self._check_function)(original, mutated)
        return source[:begin] + mutated + source[end:]

    def _find_function(self, source: str) -> tuple[int, int]:
        """Return the range of characters of the function in its file, without decorators."""
        node: ast.AST = _parse(source)
        for name in self.function.partition(":")[2].split("."):
            named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            children = ast.iter_child_nodes(node)
            found = [child for child in children if isinstance(child, named) and child.name == name]
            if len(found) != 1:
                raise NotApplicable(f"{self.name}: {name} is defined {len(found)} times in {self.path}")
            (node,) = found
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        lines = source.splitlines(keepends=True)
        return sum(map(len, lines[: node.lineno - 1])), sum(map(len, lines[: node.end_lineno]))

    def _check_function(self, original: str, mutated: str) -> None:
        try:
            changed = ast.parse(textwrap.dedent(mutated))
            compile(changed, self.function, "exec")
        except SyntaxError as error:
            raise NotApplicable(f"{self.name}: the result does not compile ({error})") from None
        if ast.dump(changed) == ast.dump(ast.parse(textwrap.dedent(original))):
            raise NotApplicable(f"{self.name}: the result is the same program")

    def _check_script(self, original: str, mutated: str) -> None:
        checked = subprocess.run(["bash", "-n"], input=mutated, capture_output=True, text=True)
        if checked.returncode:
            raise NotApplicable(f"{self.name}: the result is not a valid script ({checked.stderr.strip()})")
        if mutated == original:
            raise NotApplicable(f"{self.name}: the result is the same script")


@functools.lru_cache(maxsize=8)
def _parse(source: str) -> ast.Module:
    return ast.parse(source)
