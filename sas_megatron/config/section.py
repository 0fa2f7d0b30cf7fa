"""The base class of every config section: strict types, no unknown keys, errors that name their field."""

from __future__ import annotations

import functools
import os
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from sas_megatron.config.errors import FieldError

# Largest integer of a field: float64 and JSON readers represent integers exactly up to it.
MAX_INTEGER = 2**53
# Error messages list divisors up to this one: a search for all divisors of a huge number would not end.
MAX_LISTED_DIVISOR = 4096
# Largest number of ranks, tokens of a vocabulary or positions: Megatron-core and torch store them as int32.
MAX_INT32 = 2**31 - 1
# Linux accepts names of 255 bytes and paths of 4095; files in a folder, and endings, take some of them.
MAX_NAME_BYTES, MAX_PATH_CHARACTERS = 230, 3800


def divisors(number: int, *, limit: int = MAX_LISTED_DIVISOR) -> list[int]:
    """Return the divisors of `number` that are at most `limit`, in ascending order."""
    return [candidate for candidate in range(1, min(number, limit) + 1) if number % candidate == 0]


def _as_integers(value: Any) -> Any:
    """Return whole numbers as int, since YAML reads 5e5 as a float, and other values unchanged."""
    if isinstance(value, list):
        return [_as_integers(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_INTEGER:
        return int(value)
    return value


def largest_at_most(limit: int, choices: list[int]) -> int:
    """Return the largest of `choices`, which contain 1, that is at most `limit`."""
    return max(choice for choice in choices if choice <= max(1, limit))


def next_multiple(number: int, of: int) -> int:
    """Return the smallest multiple of `of` that is at least `number`."""
    return -(-number // of) * of


def require_path_lengths(field: str, paths: list[str]) -> None:
    """Check that the paths of a field fit a file system.

    Raises:
        FieldError: A path, or one of its names with an ending, is too long.
    """
    for path in paths:
        names = os.fsencode(path).split(b"/")
        if max(map(len, names)) > MAX_NAME_BYTES or len(path) > MAX_PATH_CHARACTERS:
            raise FieldError(
                field,
                paths if len(paths) > 1 else path,
                f"has a name of more than {MAX_NAME_BYTES} bytes, or more than {MAX_PATH_CHARACTERS} "
                "characters, which is too long for a file system",
                "use a shorter path",
            )


class Section(BaseModel):
    """A section of a run's config; immutable once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    section_name: ClassVar[str]
    # Former name -> current name of fields that files of earlier versions contain.
    former_names: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, fields: Any) -> Any:
        """Rename the fields of `former_names`; a field under its current name has priority."""
        if not isinstance(fields, dict):
            return fields
        renamed = {name: value for name, value in fields.items() if name not in cls.former_names}
        for former, name in cls.former_names.items():
            if former in fields:
                renamed.setdefault(name, fields[former])
        for name in cls._integer_fields() & renamed.keys():
            renamed[name] = _as_integers(renamed[name])
        return renamed

    @classmethod
    @functools.cache
    def _integer_fields(cls) -> frozenset[str]:
        integers = (int, int | None, list[int], list[int] | None)
        return frozenset(name for name, field in cls.model_fields.items() if field.annotation in integers)

    @model_validator(mode="after")
    def _check_integers(self) -> Self:
        # A match builds thousands of configs, so that this loop is kept cheap.
        for field, value in vars(self).items():
            for number in value if isinstance(value, list) else (value,):
                if isinstance(number, int) and abs(number) > MAX_INTEGER:
                    raise self.problem(
                        field, f"must be between -2^53 and 2^53 ({MAX_INTEGER})", "use a smaller number"
                    )
        return self

    def problem(self, field: str, rule: str, remedy: str, fix: tuple[str, ...] = ()) -> FieldError:
        """Return the error to raise when `field` of this section breaks `rule`; `fix` as in `FieldError`."""
        return FieldError(f"{self.section_name}.{field}", getattr(self, field), rule, remedy, fix)

    def require_positive(self, *fields: str) -> None:
        """Check that each of `fields` is above zero; a field that is None passes.

        Raises:
            FieldError: A field is zero or negative.
        """
        for field in fields:
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise self.problem(
                    field,
                    "must be positive",
                    "use 1 or more" if isinstance(value, int) else "use more than 0",
                )

    def require_at_most(self, most: int, *fields: str, reason: str) -> None:
        """Check that each of `fields` is at most `most`; a field that is None passes.

        Raises:
            FieldError: A field is larger.
        """
        for field in fields:
            value = getattr(self, field)
            if value is not None and value > most:
                raise self.problem(field, f"must be at most {most:,}, since {reason}", "use a smaller number")

    def require_paths(self, *fields: str) -> None:
        """Check that each of `fields`, a path or several, fits a file system; a field that is None passes.

        Raises:
            FieldError: A path, or one of its names with an ending, is too long.
        """
        for field in fields:
            value = getattr(self, field)
            paths = value if isinstance(value, list) else [value or ""]
            require_path_lengths(f"{self.section_name}.{field}", paths)

    def require_between(self, low: float, high: float, *fields: str) -> None:
        """Check that each of `fields` is in [low, high).

        Raises:
            FieldError: A field is outside of the interval.
        """
        for field in fields:
            if not low <= getattr(self, field) < high:
                below = "" if high == float("inf") else f" and below {high}"
                raise self.problem(field, f"must be at least {low}{below}", f"use {low}, for example")
