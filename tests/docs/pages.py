"""The Markdown pages of the documentation: their commands, code words and links."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS, ROOT / "launch" / "README.md"]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", flags=re.DOTALL)
# Programs that start a command in running text; commands in bash blocks may start with any program.
_PROGRAMS = ("sas-megatron ", "launch/", "tests/run.sh", "python -m ", "torchrun ", "srun ", "sbatch ")


def read_table(page: Path, heading: str) -> list[tuple[str, ...]]:
    """Return the cells of each row of the table with this heading line."""
    lines = page.read_text(encoding="utf-8").splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index(heading) + 2 :])
    return [tuple(cell.strip() for cell in row.strip("|").split(" | ")) for row in rows]


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Args:
        page: The page's path relative to the checkout.
        text: The command as it is written, with shell variables replaced by their values.
        complete: Whether it is in a bash block; a command in running text may omit arguments.
    """

    page: str
    text: str
    complete: bool

    @property
    def words(self) -> list[str]:
        """The words of the command without leading assignments, redirections and ellipses."""
        words = shlex.split(self.text, comments=True)
        while words and _ASSIGNMENT.fullmatch(words[0]):
            words.pop(0)
        if ">" in words:
            words = words[: words.index(">")]
        return [word for word in words if word not in ("…", "...")]


def read_page(page: Path) -> str:
    """Return the text of a page."""
    return page.read_text(encoding="utf-8")


def commands_of(page: Path) -> list[Command]:
    """Return the commands in the bash blocks and in the running text of a page."""
    text, name = read_page(page), str(page.relative_to(ROOT))
    in_blocks = [
        Command(name, line, complete=True)
        for language, block in _BLOCK.findall(text)
        if language == "bash"
        for line in _lines_of_script(block)
    ]
    inline = [
        Command(name, code, complete=False)
        for code in inline_code(page)
        if re.sub(r"^(?:[A-Z_]+=\S* )+", "", code).startswith(_PROGRAMS) and " " in code
    ]
    return in_blocks + inline


def inline_code(page: Path) -> list[str]:
    """Return the code in the running text and the tables of a page."""
    return _INLINE.findall(_BLOCK.sub("", read_page(page)))


def links_of(page: Path) -> list[str]:
    """Return the targets of the links and images of a page that are not on the web."""
    found = _LINK.findall(_BLOCK.sub("", read_page(page)))
    return [target for target in found if not target.startswith(("http://", "https://"))]


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub derives them."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", read_page(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _lines_of_script(block: str) -> Iterator[str]:
    """Yield the commands of a script with its own variables substituted."""
    variables: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        if len(words) == 1 and _ASSIGNMENT.fullmatch(words[0]):
            name, _, variables[name] = words[0].partition("=")
        elif words:
            yield line.strip()
