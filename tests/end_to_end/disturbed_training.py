"""Train like `sas-megatron train CONFIG`, except that a rank sends a signal to itself or to the launcher.

usage: python -m tests.end_to_end.disturbed_training WHEN TARGET SIGNAL CONFIG [section.field=value ...]

Rank 1 sends it if WHEN is `step` (in step 4), `save` (in the save before step 4) or `forever` (in step 4,
which never ends); the last rank if WHEN is `build` (while it builds its model); rank 0 if WHEN is `open`
(while it opens the files of the run, and has removed stopped.json).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sas_megatron.config.loading import load_run_config
from sas_megatron.platform.device import prepare_device
from sas_megatron.platform.launcher import launched_world_size

if __name__ == "__main__":
    prepare_device()
    from sas_megatron.training import entry, loop, run_files

    when, target, name, config, *overrides = sys.argv[1:]
    train_step, asdict, steps = loop.train_step, loop.asdict, itertools.count(1)

    def send() -> None:
        os.kill(os.getppid() if target == "launcher" else os.getpid(), signal.Signals[name])

    def disturbed_step(*args: Any, stop_requested: Any, **kwargs: Any) -> Any:
        if when in ("step", "forever") and next(steps) == 4 and os.environ["RANK"] == "1":
            send()
            deadline = time.monotonic() + 60
            while when == "forever" or (not stop_requested() and time.monotonic() < deadline):
                time.sleep(0.01)
        return train_step(*args, stop_requested=stop_requested, **kwargs)

    def disturbed_save(progress: Any) -> Any:
        if when == "save" and progress.step == 3 and os.environ["RANK"] == "1":
            send()
        return asdict(progress)

    build_engine, write_file = loop.build_engine, run_files.write_file

    def disturbed_build(*args: Any, **kwargs: Any) -> Any:
        if when == "build" and int(os.environ.get("RANK", "0")) == launched_world_size() - 1:
            send()
        return build_engine(*args, **kwargs)

    def disturbed_write(path: Path, content: Any) -> None:
        if when == "open" and path.name == "run.json":
            send()
        write_file(path, content)

    loop.train_step, loop.asdict = disturbed_step, disturbed_save
    loop.build_engine, run_files.write_file = disturbed_build, disturbed_write
    sys.exit(entry.train(load_run_config(config, overrides)).exit_status)
