"""What a command shows of the package's log when several processes run it."""

from __future__ import annotations

import logging


def configure_logging() -> None:
    """Shows what the package logs (choices of `auto`, warnings): on rank 0, and each message once."""
    from sas_megatron.platform.launcher import is_first_rank

    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message in said or said.add(message))  # type: ignore[func-returns-value]

    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(is_new)
    logging.getLogger("sas_megatron").setLevel(logging.INFO if is_first_rank() else logging.WARNING)
