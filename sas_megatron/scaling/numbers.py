"""Formatting of numbers for readers, with a dash for a missing value, and conversion to valid JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MISSING = "–"
_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def format_count(value: float | None) -> str:
    """Format with four significant digits, and k, M, B or T from ten thousand on: 2.889 M."""
    if value is None:
        return MISSING
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):#.4g}{unit}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def format_exact(value: float | None) -> str:
    """Format as an integer with thousands separators."""
    return MISSING if value is None else f"{value:,.0f}"


def format_power(value: float | None) -> str:
    """Format as a mantissa of three digits times a power of ten: 1.23 × 10¹⁵."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


def format_duration(seconds: float | None) -> str:
    """Format a time from milliseconds to days, in its two largest units."""
    if seconds is None:
        return MISSING
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def format_bytes(value: float | None) -> str:
    """Format with a binary unit: 1.5 GiB."""
    if value is None:
        return MISSING
    power = 0 if value < 1 else min(4, int(math.log2(value) // 10))
    return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def format_loss(value: float | None) -> str:
    """Format with four decimals."""
    return MISSING if value is None else f"{value:.4f}"


def format_difference(value: float | None) -> str:
    """Format a difference with a sign (U+2212 if negative) and four decimals."""
    return MISSING if value is None else f"{value:+.4f}".replace("-", "−")


def format_ratio(value: float | None) -> str:
    """Format as a factor: × 1.042."""
    return MISSING if value is None else f"× {value:.3f}"


def format_share(value: float | None) -> str:
    """Format as a percentage with one decimal."""
    return MISSING if value is None else f"{value:.1%}".replace("%", " %").replace("-", "−")


def format_significant(value: float | None) -> str:
    """Format with four significant digits, as a power of ten if there would be many zeros."""
    if value is None:
        return MISSING
    return f"{value:.4g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else format_power(value)


def format_p_value(value: float | None) -> str:
    """Format with two significant digits: p = 0.013."""
    if value is None:
        return MISSING
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def format_degrees(value: float | None) -> str:
    """Format degrees of freedom with at most one decimal."""
    return MISSING if value is None else f"{value:.1f} degrees of freedom".replace(".0 ", " ")


def format_interval(
    interval: tuple[float | None, float | None] | None,
    format_end: Callable[[float], str] = format_significant,
) -> str:
    """Format as "3.1 to 4"; a missing or infinite end is "open"."""
    if interval is None:
        return MISSING
    low, high = ("open" if end is None or math.isinf(end) else format_end(end) for end in interval)
    return f"{low} to {high}"


def format_some(names: Sequence[str]) -> str:
    """Return the first three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def format_fields(fields: Mapping[str, object]) -> str:
    """Return names and values in one line: processor x, processors 2."""
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def replace_non_finite(value: Any) -> Any:
    """Return a value with None for each non-finite number, such as an open end of an interval, for JSON."""
    if isinstance(value, dict):
        return {name: replace_non_finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
