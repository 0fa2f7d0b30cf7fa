"""What the runs may not allow: tried, and where it cannot be done the report says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sas_megatron.config.errors import FieldError

_Result = TypeVar("_Result")


class Attempts:
    """Tries one thing after another; `remarks` has a sentence for each that could not be done."""

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def make(self, what: str, function: Callable[[], _Result]) -> _Result | None:
        """What `function` returns; None where it raises `FieldError`."""
        try:
            return function()
        except FieldError as error:
            self.remarks.append(f"No {what}: {error}.")
            return None
