"""`study run` as a forked command, and the processes of its runs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.fork_server import ForkedCommand
from tests.small_data import SmallData


def base_tree(small_data: SmallData, directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    config = small_data.run(
        directory,
        training={"num_steps": 99, "global_batch_size": 8, "micro_batch_size": 8},
        evaluation={"interval": 5},
        checkpoint={"interval": 3},
        **sections,
    )
    tree: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    tree["attention"] = {"kind": "mha", "num_heads": 4, "head_dim": 12}
    return tree


@contextmanager
def study_run(path: Path, *options: str) -> Iterator[ForkedCommand]:
    """Start `study run`, which forks its runs; kill it and its runs at the end."""
    arguments = ("study", "run", path, *options)
    module = "tests.scaling.study.forked_runs"
    command = ForkedCommand(*arguments, module=module, stderr=subprocess.STDOUT)
    try:
        yield command
    finally:
        command.kill()
        kill_runs(path)


def complete(path: Path, *options: str) -> str:
    """Run `study run` to its end and return its output."""
    with study_run(path, *options) as process:
        status = process.wait(300)
    assert status == 0, process.output()
    return process.output()


def find_running(path: Path) -> list[int]:
    """Return the processes that hold the lock of one of the study's runs."""
    locks = f"{path.parent}/study/logs/"
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with suppress(OSError):
                opened = [os.readlink(descriptor) for descriptor in (folder / "fd").iterdir()]
                if any(name.startswith(locks) and name.endswith(".lock") for name in opened):
                    found.append(int(folder.name))
    return found


def kill_runs(path: Path) -> None:
    for process in find_running(path):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    wait_until(lambda: not find_running(path), seconds=20)


def wait_until(is_met: Callable[[], bool], *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_met():
        assert time.monotonic() < deadline
        time.sleep(0.01)
