"""Train like `sas-megatron train CONFIG`, except that rank 1 sends a signal to itself or to the launcher.

usage: python -m tests.end_to_end.disturbed_training WHEN TARGET SIGNAL CONFIG [section.field=value ...]

WHEN is `step` (in step 4), `save` (in the save before step 4) or `forever` (in step 4, which never ends).
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from typing import Any

from sas_megatron.config.loading import load_run_config
from sas_megatron.platform.device import prepare_device

if __name__ == "__main__":
    prepare_device()
    from sas_megatron.training import entry, loop

    when, target, name, config, *overrides = sys.argv[1:]
    train_step, asdict, steps = loop.train_step, loop.asdict, itertools.count(1)

    def send() -> None:
        os.kill(os.getppid() if target == "launcher" else os.getpid(), signal.Signals[name])

    def disturbed_step(*args: Any, stop_requested: Any, **kwargs: Any) -> Any:
        if next(steps) == 4 and os.environ["RANK"] == "1" and when != "save":
            send()
            deadline = time.monotonic() + 60
            while when == "forever" or (not stop_requested() and time.monotonic() < deadline):
                time.sleep(0.01)
        return train_step(*args, stop_requested=stop_requested, **kwargs)

    def disturbed_save(progress: Any) -> Any:
        if progress.step == 3 and os.environ["RANK"] == "1" and when == "save":
            send()
        return asdict(progress)

    loop.train_step, loop.asdict = disturbed_step, disturbed_save
    sys.exit(entry.train(load_run_config(config, overrides)).exit_status)
