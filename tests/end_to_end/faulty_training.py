"""Train like `sas-megatron train CONFIG`, except that rank 3 calls a function in its step 4.

usage: python -m tests.end_to_end.faulty_training FAULT CONFIG, where FAULT is the name of a function below
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from typing import Any

from sas_megatron.config.loading import load_run_config
from sas_megatron.platform.device import prepare_device


def raise_error() -> None:
    raise ValueError("this sample is no good")


def loop_for_ever() -> None:
    while True:
        time.sleep(0.01)


if __name__ == "__main__":
    prepare_device()
    from sas_megatron.training import entry, loop

    fault, train_step, steps = globals()[sys.argv[1]], loop.train_step, itertools.count(1)

    def faulty_step(*args: Any, **kwargs: Any) -> Any:
        if next(steps) == 4 and os.environ["RANK"] == "3":
            fault()
        return train_step(*args, **kwargs)

    loop.train_step = faulty_step
    entry.train(load_run_config(sys.argv[2]))
