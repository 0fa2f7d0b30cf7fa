"""Errors that a user can mend, in one form: field, value, rule, remedy."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """What the user gave cannot be used; the command line prints it and exits with status 2."""

    # Set where all ranks of a run are known to raise the same.
    raised_on_all_ranks = False


class FieldError(UserError):
    """One field breaks a rule: `attention.kernel_size=4: must be odd, so that …; use 3 or 5`."""

    def __init__(self, field: str, value: object, rule: str, remedy: str) -> None:
        self.field = field
        self.value = value
        self.rule = rule
        self.remedy = remedy
        super().__init__(f"{field}={value}: {rule}; {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.rule, self.remedy)


class FileProblem(UserError):
    """A file cannot be read, written or understood: `PATH: what is wrong; what to do`."""

    def __init__(self, path: object, problem: str, remedy: str) -> None:
        self.path, self.problem, self.remedy = path, problem, remedy
        super().__init__(f"{path}: {problem}; {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem, self.remedy)
