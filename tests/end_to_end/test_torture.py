"""However often ranks are killed, in a step, while saving or loading, the run ends as if none had been."""

from __future__ import annotations

import json
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

WHOLE_TABLE = [(seed, 5) for seed in range(6)]
NUM_RANKS = 2
SECONDS_TO_END = 120

# Trains as `sas-megatron train` does, but that one rank kills itself: so many seconds after the n-th
# step, save or load began, or as it ends where that comes first. What it was at goes to a file before.
ENTRY = """
import json, os, signal, sys, threading, time
from sas_megatron.config.loading import load_run_config
from sas_megatron.platform.device import prepare_device

def die(at_end):
    the_only_one.acquire()
    frame = sys._current_frames()[threading.main_thread().ident]
    place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
    with open(record, "a") as file:
        print(json.dumps({"phases": open_phases, "at_end": at_end, "place": place}), file=file)
    os.kill(os.getpid(), signal.SIGKILL)

def die_later():
    time.sleep(seconds)
    die(at_end=False)

def enter(phase):
    global left
    open_phases.append(phase)
    left -= phase == wanted
    if left == 0 and phase == wanted and os.environ["RANK"] == rank:
        threading.Thread(target=die_later, daemon=True).start()

def leave(phase):
    if left == 0 and phase == wanted and os.environ["RANK"] == rank:
        die(at_end=True)
    open_phases.remove(phase)

def mark(owner, name, *, enters=None, leaves=None):
    marked = getattr(owner, name)
    def run_marked(*args, **kwargs):
        enters and enter(enters)
        result = marked(*args, **kwargs)
        leaves and leave(leaves)
        return result
    setattr(owner, name, run_marked)

if __name__ == "__main__":
    record, rank, wanted, left, seconds = *sys.argv[1:4], int(sys.argv[4]), float(sys.argv[5])
    the_only_one, open_phases = threading.Lock(), []
    prepare_device()
    from sas_megatron.training import loop, start
    mark(loop, "train_step", enters="step", leaves="step")
    # Behind the training, too, where it is asynchronous.
    mark(loop.CheckpointSaver, "_begin", enters="save")
    mark(loop.CheckpointSaver, "_publish", leaves="save")
    mark(loop, "find_newest_whole", enters="load")
    mark(loop.Run, "_resume", leaves="load")
    start.train(load_run_config(sys.argv[6]))
"""

# Phase -> which of them may be hit, and how long to wait at most: about as long as one takes.
PHASES: dict[str, tuple[int, float]] = {"step": (4, 0.1), "save": (2, 0.3), "load": (1, 0.6)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Three kills, or with --all thirty: fourteen while saving, eight in a step, eight loading."""
    whole = metafunc.config.getoption("--all")
    metafunc.parametrize(("seed", "num_kills"), WHOLE_TABLE if whole else [(0, 3)])


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
    ranks: Any,
    small_data: SmallData,
    job_of: Callable[[RunConfig], Job],
    tmp_path: Path,
    seed: int,
    num_kills: int,
) -> None:
    # A killed attempt is done with at most four steps: all of them leave some for the last.
    num_steps = 4 * num_kills + 3

    def run(name: str) -> RunConfig:
        return small_data.run(
            tmp_path / name,
            parallel={"tensor": 2, "sequence": True},
            model={"hidden_dropout": 0.1},
            training={"num_steps": num_steps, "micro_batch_size": 2},
            evaluation={"interval": None},
            checkpoint={"interval": 2, "keep_last": 2, "resume": True, "asynchronous": seed % 2 == 1},
        )

    undisturbed, tortured = run("undisturbed"), run("tortured")
    ranks(NUM_RANKS).run(complete, undisturbed)
    draw = random.Random(seed)
    job, record = job_of(tortured), tmp_path / "kills.jsonl"
    # A first attempt that has saved once, so that the next have something to load.
    later = [*PHASES, list(PHASES)[seed % len(PHASES)]]
    draw.shuffle(later)
    moments = [("save", 2), *((phase, draw.randint(1, PHASES[phase][0])) for phase in later)][:num_kills]
    for phase, which in moments:
        moment = (phase, which, draw.uniform(0, PHASES[phase][1]))
        rank = draw.randrange(NUM_RANKS)
        job.start_entry(ENTRY, str(record), str(rank), *map(str, moment), num_ranks=NUM_RANKS)
        assert job.wait(SECONDS_TO_END) == 1, f"{moment}\n{job.output()}"
        assert "-9" in job.output(), f"nobody was killed: {moment}\n{job.output()}"
        assert not job.processes()
        for path in find_checkpoints(tmp_path / "tortured" / "checkpoints"):
            verify_checkpoint(path)
    kills = [json.loads(line) for line in record.read_text().splitlines()]
    for (phase, _), kill in zip(moments, kills, strict=True):
        assert phase in kill["phases"], kill
        # For whoever runs this with -rP.
        print(phase, "at its end" if kill["at_end"] else "within", kill["place"])
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
    assert sorted(left) == [f"iter_{step:07d}" for step in (num_steps - 1, num_steps)]
