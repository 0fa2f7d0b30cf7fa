"""The base class of every config section: strict types, no unknown keys, errors that name their field."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from sas_megatron.config.errors import FieldError


def divisors(number: int) -> list[int]:
    """Return the divisors of `number` in ascending order; error messages list them as valid values."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


class Section(BaseModel):
    """A section of a run's config; immutable once built."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    section_name: ClassVar[str]

    def problem(self, field: str, rule: str, remedy: str) -> FieldError:
        """Return the error to raise when `field` of this section breaks `rule`."""
        return FieldError(f"{self.section_name}.{field}", getattr(self, field), rule, remedy)

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

    def require_between(self, low: float, high: float, *fields: str) -> None:
        """Check that each of `fields` is in [low, high).

        Raises:
            FieldError: A field is outside of the interval.
        """
        for field in fields:
            if not low <= getattr(self, field) < high:
                below = "" if high == float("inf") else f" and below {high}"
                raise self.problem(field, f"must be at least {low}{below}", f"use {low}, for example")
