"""Save and load weights and optimizer states of 195 MB; print the memory that each step allocates."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sas_megatron.config.run import RunConfig
from tests.run_configs import small_config

_M_MMAP_THRESHOLD = -3  # <malloc.h>


def config_of(*, asynchronous: bool) -> RunConfig:
    """Return a config whose weights and optimizer states have 195 MB."""
    return small_config(
        attention={"kind": "mha", "num_heads": 8, "head_dim": 64},
        model={
            "num_layers": 6,
            "hidden_size": 512,
            "ffn_hidden_size": 1024,
            "vocab_size": 512,
            "vocab_multiple": 1,
        },
        data={"sequence_length": 8},
        # All states of the distributed optimizer are views of larger buffers.
        optimizer={"distributed": True},
        checkpoint={"asynchronous": asynchronous},
    )


def measure_growth(action: Callable[[], object]) -> int:
    """Return the largest increase of resident memory during `action`, in bytes."""
    from sas_megatron.platform.device import read_memory_bytes

    # Reset the peak (VmHWM) to the resident memory; see proc(5).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = read_memory_bytes("/proc/self/status", "VmRSS")
    action()
    return read_memory_bytes("/proc/self/status", "VmHWM") - before


def save(engine: Any, topology: Any, folder: Path, step: int, *, asynchronous: bool) -> None:
    """Save a checkpoint and wait until it is published."""
    from sas_megatron.checkpoint.saving import CheckpointSaver

    saver = CheckpointSaver(folder, config_of(asynchronous=asynchronous), topology)
    saver.save(
        step,
        shards=engine.shards(),
        progress={"counts": {"step": step}, "engine": engine.counts(), "schedule_steps": step},
        write_files=engine.write_files,
    )
    saver.finish()


def main(folder: Path) -> None:
    """Print the numbers of bytes as JSON."""
    # Freed memory is returned to the system immediately, so that resident memory equals allocated memory.
    assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 65536), "mallopt failed"
    from sas_megatron.platform.device import prepare_device

    device = prepare_device()
    from sas_megatron.checkpoint.manifest import find_checkpoints
    from sas_megatron.checkpoint.restoring import open_checkpoint
    from sas_megatron.distributed.topology import joined_topology
    from sas_megatron.training.build import build_engine
    from tests.checkpoint.saved_runs import take_steps_from

    config = config_of(asynchronous=False)
    with joined_topology(config.parallel, device=device, seed=1, timeout_minutes=1) as topology:
        engine = build_engine(config)
        take_steps_from(engine, topology, 0, 1)
        # The first save also allocates memory that is kept.
        save(engine, topology, folder, 1, asynchronous=False)
        (path,) = find_checkpoints(folder)
        found = {
            "states": sum(shard.data.nbytes for shard in engine.shards()),
            "save": measure_growth(lambda: save(engine, topology, folder, 2, asynchronous=False)),
            "asynchronous_save": measure_growth(lambda: save(engine, topology, folder, 3, asynchronous=True)),
            "load": measure_growth(lambda: engine.restore(open_checkpoint(path))),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
