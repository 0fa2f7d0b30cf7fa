"""However often ranks are killed, in a step, while saving or loading, the run ends as if none had been."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.checkpoint.manifest import find_checkpoints, verify_checkpoint
from sas_megatron.config.run import RunConfig
from tests.end_to_end.jobs import Job
from tests.small_data import SmallData
from tests.training.test_runs import assert_end_alike, complete, records, summary

KILLS = 5
WHOLE_TABLE_SEEDS = 6
NUM_RANKS = 2
SECONDS_TO_END = 120

# Trains as `sas-megatron train` does, but that one rank kills itself, so many seconds after it enters
# the n-th step, save or load.
ENTRY = """
import os, signal, sys, threading, time
from sas_megatron.config.loading import load_run_config
from sas_megatron.platform.device import prepare_device

def kill_later(seconds):
    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=kill, daemon=True).start()

if __name__ == "__main__":
    rank, phase, left, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    prepare_device()
    from sas_megatron.training import loop, start
    holder, name = {
        "step": (loop, "train_step"),
        "save": (loop.CheckpointSaver, "save"),
        "load": (loop, "find_newest_whole"),
    }[phase]
    entered = getattr(holder, name)
    def enter(*args, **kwargs):
        global left
        left -= 1
        if left == 0 and os.environ["RANK"] == rank:
            kill_later(seconds)
        return entered(*args, **kwargs)
    setattr(holder, name, enter)
    start.train(load_run_config(sys.argv[5]))
"""

# Phase -> which of them may be hit, and how long to wait at most: about as long as one takes.
PHASES: dict[str, tuple[int, float]] = {"step": (4, 0.1), "save": (2, 0.3), "load": (1, 0.6)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Five kills, or with --whole-table thirty."""
    whole = metafunc.config.getoption("--whole-table")
    metafunc.parametrize("seed", range(WHOLE_TABLE_SEEDS if whole else 1))


@pytest.fixture
def job_of(tmp_path: Path) -> Any:
    jobs = []

    def start(config: RunConfig) -> Job:
        jobs.append(Job(tmp_path, config))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def test_a_run_whose_ranks_are_killed_ends_as_the_undisturbed_one(
    ranks: Any, small_data: SmallData, job_of: Callable[[RunConfig], Job], tmp_path: Path, seed: int
) -> None:
    def run(name: str) -> RunConfig:
        return small_data.run(
            tmp_path / name,
            parallel={"tensor": 2, "sequence": True},
            model={"hidden_dropout": 0.1},
            # A killed attempt is done with at most four steps: all of them leave some for the last.
            training={"num_steps": 4 * KILLS + 3, "micro_batch_size": 2},
            evaluation={"interval": None},
            checkpoint={"interval": 2, "keep_last": 2, "resume": True, "asynchronous": seed % 2 == 1},
        )

    undisturbed, tortured = run("undisturbed"), run("tortured")
    ranks(NUM_RANKS).run(complete, undisturbed)
    draw = random.Random(seed)
    job = job_of(tortured)
    # A first attempt that saves, so that the next have something to load.
    phases = ["save", *draw.choices(list(PHASES), k=KILLS - 2), "load"]
    for phase in phases:
        which, seconds = PHASES[phase]
        moment = (phase, draw.randint(1, which), draw.uniform(0, seconds))
        job.start_entry(ENTRY, str(draw.randrange(NUM_RANKS)), *map(str, moment), num_ranks=NUM_RANKS)
        assert job.wait(SECONDS_TO_END) == 1, f"{moment}\n{job.output()}"
        assert "-9" in job.output(), f"nobody was killed: {moment}\n{job.output()}"
        assert not job.processes()
        for path in find_checkpoints(tmp_path / "tortured" / "checkpoints"):
            verify_checkpoint(path)
    train = ("-m", "sas_megatron", "train", str(job.config))
    job.start("torchrun", "--standalone", f"--nproc-per-node={NUM_RANKS}", *train)
    assert job.wait(SECONDS_TO_END) == 0, job.output()

    assert_end_alike(tortured, undisturbed)
    timeless = ("step", "consumed_samples", "train_loss", "gradient_norm", "learning_rate")
    assert [[record[key] for key in timeless] for record in records(tortured)] == [
        [record[key] for key in timeless] for record in records(undisturbed)
    ]
    assert summary(tortured)["final_validation_loss"] == summary(undisturbed)["final_validation_loss"]
    left = [path.name for path in (tmp_path / "tortured" / "checkpoints").iterdir()]
    assert sorted(left) == ["iter_0000022", "iter_0000023"]
