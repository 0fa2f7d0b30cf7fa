"""States what a tokenizer changes in a text that it encodes and decodes, found by encoding short probes."""

from __future__ import annotations

from collections.abc import Callable

EXACT = "exact"
# Each change with texts that show it. The first that applies to a text is named.
_PROBES = (
    ("letters become lower case", "A"),
    ("accents are removed", "\u00e9"),
    ("combining characters are composed (NFC)", "e\u0301"),
    ("composed characters are decomposed (NFD)", "\u00e9\u00c5"),
    ("compatibility characters are replaced (NFKC)", "\ufb01\uff21"),
    ("a space at the beginning is removed", " a"),
    ("spaces at the end are removed", "a "),
    ("repeated spaces become one", "a  b"),
    ("line breaks or tabs are replaced", "a\n\nb\r\nc\td"),
    ("control characters are removed", "a\0\x01\x1f\x7fb"),
    ("U+2581 becomes a space", "a\u2581b"),
)
# Characters of all planes and of the categories that libraries treat differently.
_VARIOUS = (
    "".join(map(chr, range(0x20, 0x250)))
    + "\u00a0\u0f3a\u200b\u200d\u2028\u3000\ufe0f\ufeff\ufffd\ufffe\ue000\u0378\u05d0\u0627\u4e2d\uac00"
    + "\U0001f600\U0001f468\u200d\U0001f469\U000e0061\U000f0000\U0010ffff"
)


def describe_changes(decode_encoded: Callable[[str], str]) -> str:
    """Return `EXACT`, or the changes that encoding and decoding make.

    Args:
        decode_encoded: Encodes a text and decodes its tokens.
    """
    changes = [change for change, text in _PROBES if decode_encoded(text) != text]
    if changes:
        return "; ".join(changes)
    for character in "" if decode_encoded(_VARIOUS) == _VARIOUS else _VARIOUS:
        if (decoded := decode_encoded(character)) != character:
            return f"some characters are replaced, such as {character!a} by {decoded!a}"
    return EXACT
