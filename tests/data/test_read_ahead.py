"""Items are read ahead of their use in a thread: in order, with errors, and not more than the depth."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest

from sas_megatron.data.read_ahead import ReadAhead

SECONDS = 10.0


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Source:
    """Yields numbers and records how many it has started."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.started: list[int] = []

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            self.started.append(number)
            yield number


def test_items_are_read_while_nothing_is_taken_but_not_more_than_the_depth() -> None:
    source = Source(100)
    ahead = ReadAhead(iter(source), depth=3)
    # Three are ready, and the thread holds a fourth one.
    wait_until(lambda: len(source.started) == 4)
    time.sleep(0.05)
    assert len(source.started) == 4
    assert next(ahead) == 0
    wait_until(lambda: len(source.started) == 5)
    ahead.close()


def test_all_items_come_in_order_and_the_end_is_final() -> None:
    ahead = ReadAhead(iter(range(10)), depth=2)
    assert list(ahead) == list(range(10))
    assert next(ahead, None) is None
    assert next(ahead, None) is None


def test_an_error_of_the_thread_is_raised_after_the_items_before_it() -> None:
    def failing() -> Iterator[int]:
        yield 1
        raise OSError("no such file")

    ahead = ReadAhead(failing())
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(OSError, match="no such file"):
            next(ahead)


def test_the_thread_ends_when_nothing_refers_to_its_reader() -> None:
    source = Source(10**9)
    ahead = ReadAhead(iter(source), depth=2)
    reference = weakref.ref(ahead)
    assert any(thread.name == "read ahead" for thread in threading.enumerate())
    del ahead
    gc.collect()
    assert reference() is None
    wait_until(lambda: all(thread.name != "read ahead" for thread in threading.enumerate()))
