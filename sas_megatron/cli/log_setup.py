"""Logging of commands that several processes run."""

from __future__ import annotations

import logging


def configure_logging() -> None:
    """Print the package's log messages (such as the choices of `auto`) on rank 0, and each message only once.

    Other ranks print warnings only.
    """
    from sas_megatron.platform.launcher import is_rank0

    logging.basicConfig(format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_NewMessages())
    logging.getLogger("sas_megatron").setLevel(logging.INFO if is_rank0() else logging.WARNING)


class _NewMessages(logging.Filter):
    """Passes each message once; every handler needs its own, since each handles all messages."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._passed
        self._passed.add(message)
        return is_new
