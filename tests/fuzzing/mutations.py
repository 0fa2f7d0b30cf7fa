"""Strategies of hypothesis that damage small valid files: bytes, and values of JSON and YAML trees."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]

# Values in JSON, which is also YAML: each type, bounds of numbers, text that is no path or no UTF-8.
_VALUES = (
    *("null", "true", "false", "0", "-1", "1", "2", "3", "7", "64", "1000000007"),
    *("0.5", "-0.0", "1.5", "1e308", "1e400", "-1e400", "1e-320", "NaN", "Infinity", "-Infinity"),
    *map(str, (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64)),
    *(str(-(2**63)), "1" + "0" * 30, "1" + "0" * 400, "9" * 5000),
    *(
        '""',
        '"x"',
        '"4"',
        '"1e3"',
        '"\\u0000"',
        '"a\\u0000b"',
        '"\\ud800"',
        '"\\u2028é"',
        '"../x"',
        '"/"',
        '"."',
    ),
    *('"/dev/zero"', '"/proc/self/mem"', f'"{"n" * 300}"', f'"{"long " * 4000}"'),
    *("[]", "[[]]", "[null]", "[0]", "[1,2]", '["a"]', '["a","a"]', "[true]", "[1e308,1e308]"),
    *("{}", '{"":null}', '{"a":1}', '{"a":{"b":[1]}}', '{"a":null,"a":1}'),
    *("[" * depth + "]" * depth for depth in (50, 500)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (50, 500)),
)
# ruamel takes a second to refuse these, and the product's own limit is far below.
_DEEP_JSON_VALUES = ("[" * 20_000 + "]" * 20_000, '{"a":' * 5000 + "1" + "}" * 5000)
_YAML_VALUES = (
    *("~", "yes", "0x10", "0x" + "f" * 5000, "0o7", "1_000", "1:30", ".inf", "-.inf", ".nan", "+.5", "1e3"),
    *("2020-02-30", "2020-02-28", "2001-12-14t21:59:43.10-05:00", "2020-13-45", "!!binary aGk=", "!!str 4"),
    *("!!int x", "!!float x", "!!set {a}", "!!omap [a: 1]", "!!python/object/apply:os.system [ls]", "!x y"),
    *("&a [*a]", "&a {b: *a}", "*missing", "{1: 2}", "{null: 1}", "{[a]: 1}", "{? {a: 1} : 2}", "{<<: 3}"),
    "{a: &a [x,x,x,x,x,x,x,x,x], b: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a], c: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b], "
    "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c], e: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d], "
    "f: &f [*e,*e,*e,*e,*e,*e,*e,*e,*e], g: &g [*f,*f,*f,*f,*f,*f,*f,*f,*f], h: [*g,*g,*g,*g]}",
)
# Text that is inserted into files.
_FRAGMENTS = (
    *(
        b"\0",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\r",
        b"\n\n",
        b"\t",
    ),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"'",
        b",",
        b":",
        b"- ",
        b"#",
        b"&a ",
        b"*a",
        b"? ",
        b"| ",
        b"%YAML 9.9\n",
    ),
    *(b"---\n", b"...\n", b"!!", b"<<: ", b"\x1b[2J", b"\x85", b"1e999", b"-", b"../", b"A" * 70_000),
    *(bytes(8), b"\xff" * 8, (2**31 - 1).to_bytes(4, "little"), (2**63 - 1).to_bytes(8, "little")),
    *((2**62).to_bytes(8, "little"), (2**32).to_bytes(8, "little"), b"\x7f" * 4, b"\x80" + bytes(3)),
)
_KEYS = ('""', '"x"', '"\\u0000"', '"\\ud800"', '"../x"', '"__class__"', '"n.m"', '"' + "k" * 300 + '"')


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Flip bits, and cut, insert, overwrite and repeat parts of `content`."""
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        position = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(("flip", "insert", "overwrite", "cut", "truncate", "repeat", "byte"))):
            case "flip":
                flipped = bytes([content[position] ^ (1 << draw(st.integers(0, 7)))]) if content else b""
                content = content[:position] + flipped + content[position + 1 :]
            case "byte":
                content = (
                    content[:position] + draw(st.binary(min_size=1, max_size=1)) + content[position + 1 :]
                )
            case "insert":
                content = content[:position] + draw(st.sampled_from(_FRAGMENTS)) + content[position:]
            case "overwrite":
                fragment = draw(st.sampled_from(_FRAGMENTS))
                content = content[:position] + fragment + content[position + len(fragment) :]
            case "cut":
                content = content[:position] + content[position + draw(st.integers(1, 64)) :]
            case "truncate":
                content = content[:position]
            case "repeat":
                length = draw(st.integers(1, 64))
                content = content[: position + length] + content[position:]
    return content


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Replace, remove, add, rename and copy values of a JSON document."""
    return draw(_damaged_tree(json.loads(content), _VALUES + _DEEP_JSON_VALUES)).encode(
        "utf-8", "surrogatepass"
    )


@st.composite
def damaged_yaml(draw: st.DrawFn, content: bytes) -> bytes:
    """Replace, remove, add, rename and copy values of a YAML document, which becomes flow style."""
    tree = _load_yaml(content)
    return draw(_damaged_tree(tree, _VALUES + _YAML_VALUES)).encode("utf-8", "surrogatepass")


@st.composite
def damaged_lines(draw: st.DrawFn, content: bytes) -> bytes:
    """Damage a line of JSON Lines, and repeat, remove and exchange lines."""
    lines = content.splitlines(keepends=True)
    index = draw(st.integers(0, len(lines) - 1))
    match draw(st.sampled_from(("tree", "tree", "tree", "remove", "repeat", "swap", "blank"))):
        case "tree":
            lines[index] = draw(damaged_json(lines[index])) + b"\n"
        case "remove":
            del lines[index]
        case "repeat":
            lines.insert(index, lines[index])
        case "swap":
            lines[index], lines[0] = lines[0], lines[index]
        case "blank":
            lines.insert(index, draw(st.sampled_from((b"\n", b" \r\n", b"null\n", b"{}\n", b"\0\n"))))
    return b"".join(lines)


@functools.cache
def _load_yaml(content: bytes) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(content.decode())


@st.composite
def _damaged_tree(draw: st.DrawFn, tree: Any, values: Sequence[str]) -> str:
    """Return a damaged tree as JSON, with values that JSON's writer cannot write."""
    tree = copy.deepcopy(tree)
    inserted: dict[str, str] = {}

    def marker(text: str) -> str:
        name = f"@{len(inserted)}@"
        inserted[name] = text
        return name

    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        paths = _paths(tree)
        if not paths:
            return draw(st.sampled_from(values))
        path = paths[draw(st.integers(0, len(paths) - 1))]
        parent, key = _follow(tree, path[:-1]), path[-1]
        kinds = ("replace",) * 4 + ("nudge",) * 3 + ("remove", "add", "rename", "copy", "wrap")
        match draw(st.sampled_from(kinds)):
            case "nudge" if isinstance(parent[key], int | float):
                # Such values are often valid, so that more of the product is reached.
                change = draw(
                    st.sampled_from((lambda n: n + 1, lambda n: 2 * n, lambda n: 1000 * n, lambda n: n // 2))
                )
                parent[key] = not parent[key] if isinstance(parent[key], bool) else change(parent[key])
            case "replace":
                parent[key] = marker(draw(st.sampled_from(values)))
            case "remove":
                del parent[key]
            case "add" if isinstance(parent, dict):
                parent[marker(draw(st.sampled_from(_KEYS)))] = marker(draw(st.sampled_from(values)))
            case "rename" if isinstance(parent, dict):
                parent[marker(draw(st.sampled_from(_KEYS)))] = parent.pop(key)
            case "copy":
                parent[key] = copy.deepcopy(_follow(tree, paths[draw(st.integers(0, len(paths) - 1))]))
            case _:
                parent[key] = [parent[key]]
    text = json.dumps(tree, ensure_ascii=False, default=str)
    for name, value in inserted.items():
        text = text.replace(f'"{name}"', value)
    return text


def _paths(tree: Any, prefix: Path = ()) -> list[Path]:
    """Return the paths of all values below the root."""
    keys: Any = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    return [path for key in list(keys) for path in ((*prefix, key), *_paths(tree[key], (*prefix, key)))]


def _follow(tree: Any, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def damaged(
    content: bytes, *structured: Callable[[bytes], st.SearchStrategy[bytes]]
) -> st.SearchStrategy[bytes]:
    """Damage a file by its bytes, or three times as often by its structure."""
    by_structure = [strategy(content) for strategy in structured]
    return st.one_of(damaged_bytes(content), *(3 * by_structure))
