"""Logging of commands that several processes run."""

from __future__ import annotations

import logging


def configure_logging() -> None:
    """Print the package's log messages (such as the choices of `auto`) on rank 0, and each message only once.

    Other ranks print warnings only.
    """
    from sas_megatron.platform.launcher import is_rank0

    printed: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in printed or printed.add(message))  # type: ignore[func-returns-value]

    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(is_new)
    logging.getLogger("sas_megatron").setLevel(logging.INFO if is_rank0() else logging.WARNING)
