"""Read YAML text within limits, so that no file exhausts the memory or takes minutes.

A small text can describe a large tree: an alias repeats what it names, and a number in hexadecimal digits or
a nested list can be longer than Python converts to text. Such texts are refused.
"""

from __future__ import annotations

import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

# The longest YAML file of the project has 4 kB. Reading takes about 1 s per MB.
MAX_FILE_BYTES = 2_000_000
MAX_VALUES = 100_000
MAX_DEPTH = 50
TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep"
# Larger integers have no float64, in which costs and optimizers compute.
MAX_INTEGER_BITS = 1023


# ruamel would read these for seconds before Python's limit on recursion ends it.
_DEEP_START = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}")


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        ValueError: The text is not YAML, or exceeds a limit; the message is one line: "is not YAML (…)".
    """
    if _DEEP_START.search(text):
        raise ValueError(TOO_DEEP)
    try:
        value = YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    except Exception as error:
        # ruamel raises YAMLError, ValueError for an invalid date or number, such as 2020-13-45, and for some
        # texts KeyError or another error of its own code.
        reason = str(error) if isinstance(error, YAMLError | ValueError) else repr(error)
        raise ValueError(f"is not YAML ({' '.join(reason.split())})") from None
    _count_values(value, known={}, open_containers=set())
    return value


def _count_values(value: Any, *, known: dict[int, int], open_containers: set[int]) -> int:
    """Return the number of values in a tree, where a value counts each time that an alias names it.

    Args:
        value: The tree.
        known: The counts of containers by their id, so that each is visited once.
        open_containers: The ids of the containers that contain `value`.

    Raises:
        ValueError: The tree exceeds a limit, contains itself, or has text that no path can contain.
    """
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise ValueError("has an integer of more than 300 digits")
    if not isinstance(value, dict | list | set):
        return 1
    if id(value) in known:
        return known[id(value)]
    if id(value) in open_containers:
        raise ValueError("has an alias within the value that it names")
    if len(open_containers) >= MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    open_containers.add(id(value))
    inner = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
    count = 1
    for each in inner:
        count += _count_values(each, known=known, open_containers=open_containers)
        if count > MAX_VALUES:
            raise ValueError(f"has more than {MAX_VALUES:,} values, counting each alias as a copy")
    open_containers.remove(id(value))
    known[id(value)] = count
    return count


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError("has text with a NUL character, which no path or name can contain")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("has text with an unpaired surrogate, which UTF-8 cannot represent") from None
