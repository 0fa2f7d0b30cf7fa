"""Every handler of the log prints each message once."""

from __future__ import annotations

import logging

import pytest

from sas_megatron.cli.log_setup import configure_logging


class _Collecting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def test_each_handler_prints_each_message_once(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = [_Collecting(), _Collecting()]
    monkeypatch.setattr(logging.getLogger(), "handlers", handlers)
    configure_logging()
    logger = logging.getLogger("sas_megatron.data.sources")
    for message in ("left out", "read", "left out"):
        logger.info(message)
    assert [handler.messages for handler in handlers] == [["left out", "read"]] * 2
