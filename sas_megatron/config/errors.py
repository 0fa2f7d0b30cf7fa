"""User errors in one form (field or file, value, rule, remedy), and the translation of OSError into them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Messages show no more of a value; a path has at most this length on Linux.
MAX_SHOWN_CHARACTERS = 4096


def shorten(value: object) -> str:
    """Return a value as text for a message; of a longer text than a path only the beginning."""
    text = str(value)
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return text
    return f"{text[:100]}… ({len(text):,} characters)"


class UserError(Exception):
    """An error in the user's input; the command line prints its message and exits with status 2."""

    # Set to True where every rank of a run is known to raise the same error.
    raised_on_all_ranks = False


class FieldError(UserError):
    """A field whose value breaks a rule: `attention.kernel_size=4: must be odd, so that …; use 3 or 5`.

    Args:
        field: The dotted name.
        value: Its value.
        rule: The rule.
        remedy: How the user can follow the rule.
        fix: Overrides that do so, such as `attention.kernel_size=3`; the command line prints the command
            with them.
    """

    def __init__(self, field: str, value: object, rule: str, remedy: str, fix: tuple[str, ...] = ()) -> None:
        self.field = field
        self.value = value
        self.rule = rule
        self.remedy = remedy
        self.fix = fix
        super().__init__(f"{field}={shorten(value)}: {shorten(rule)}; {shorten(remedy)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.rule, self.remedy, self.fix)


class WorldSizeError(FieldError):
    """A number of processes that a run cannot use; `num_processes` is one that it can use."""

    def __init__(self, field: str, value: object, rule: str, remedy: str, num_processes: int) -> None:
        self.num_processes = num_processes
        super().__init__(field, value, rule, remedy)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.rule, self.remedy, self.num_processes)


class FileProblem(UserError):
    """A file that cannot be read, written or parsed: `PATH: problem; remedy`."""

    def __init__(self, path: object, problem: str, remedy: str) -> None:
        self.path, self.problem, self.remedy = path, problem, remedy
        super().__init__(f"{shorten(path)}: {shorten(problem)}; {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem, self.remedy)


@contextmanager
def translate_os_errors(
    path: object,
    *,
    problem: str,
    remedy: str,
    missing: tuple[str, str] | None = None,
    disk_full_remedy: str | None = None,
    error_type: Callable[[object, str, str], UserError] = FileProblem,
) -> Iterator[None]:
    """Raise a user error for an OSError in the block, or for a path that no file can have.

    Args:
        path: The file or folder that the message names.
        problem: For example "cannot be written"; the operating system's reason is appended in parentheses.
        remedy: How the user can fix the problem.
        missing: Problem and remedy for a file that does not exist; its problem is given without a reason.
        disk_full_remedy: The remedy for a full disk or an exceeded quota, if it differs from `remedy`.
        error_type: Builds the error from path, problem and remedy; `functools.partial(FieldError, name)`
            for a path that a config field holds.

    Raises:
        UserError: The block raised such an error; by default a `FileProblem`.
    """
    try:
        yield
    except ValueError as error:
        if not _is_about_path(error):
            raise
        raise error_type(path, f"{problem} ({error})", "use another path") from error
    except OSError as error:
        if missing is not None and isinstance(error, FileNotFoundError):
            problem, remedy = missing
        else:
            problem = f"{problem} ({describe_os_error(error)})"
            if disk_full_remedy is not None and error.errno in (errno.ENOSPC, errno.EDQUOT):
                remedy = disk_full_remedy
        raise error_type(path, problem, remedy) from error


def _is_about_path(error: ValueError) -> bool:
    """Whether Python raised the error for a path with a NUL character or an unpaired surrogate."""
    has_surrogate = isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason
    return has_surrogate or "null byte" in str(error)


def describe_os_error(error: OSError) -> str:
    """Return the operating system's reason, such as "Permission denied", without error number and path."""
    return error.strerror or " ".join(str(error).split()) or type(error).__name__
