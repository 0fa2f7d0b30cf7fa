"""The documentation stays short and connected: numbers of words and terms, links, and the front page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, README, ROOT, anchors_of, links_of, read_page

README_WORDS = 900
PAGE_WORDS = range(150, 1401)
GLOSSARY = ROOT / "docs" / "glossary.md"
GLOSSARY_TERMS = 60
# Tables and lines with links may be longer.
LINE_LENGTH = 112


def rows_of(section: str) -> list[list[str]]:
    """Return the cells of the table in a section, without its heading."""
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def section_of(page: Path, heading: str) -> str:
    """Return the text under a heading of a page, up to the next heading."""
    return read_page(page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_readme_is_short() -> None:
    assert len(read_page(README).split()) <= README_WORDS


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_is_neither_empty_nor_too_long(page: Path) -> None:
    assert len(read_page(page).split()) in PAGE_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in links_of(page):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_readme_links_to_every_page() -> None:
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in links_of(README)}
    assert set(DOCS) <= linked


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_lines_of_text_fit_an_editor(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", read_page(page), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith("|") and "](" not in line]
    assert not [line for line in lines if len(line) > LINE_LENGTH]


def test_the_glossary_is_short_sorted_and_defines_each_term_once() -> None:
    terms = [row[0] for row in rows_of(section_of(GLOSSARY, "Terms"))]
    assert 0 < len(terms) <= GLOSSARY_TERMS
    assert terms == sorted(set(terms), key=str.lower)


def test_each_shape_letter_has_one_meaning() -> None:
    letters = {row[0]: row[1] for row in rows_of(section_of(GLOSSARY, "Shape letters"))}
    assert letters["C"] == "context-parallel ranks"
    assert {"S", "B", "H", "N", "G", "D", "r", "M", "E", "k", "P", "C"} <= set(letters)
    assert len(rows_of(section_of(GLOSSARY, "Shape letters"))) == len(letters)
