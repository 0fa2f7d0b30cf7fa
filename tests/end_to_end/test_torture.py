"""A run whose ranks are killed in steps, saves and loads ends bit-identically to an undisturbed run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from sas_megatron.checkpoint.manifest import find_checkpoints, verify_checkpoint
from sas_megatron.config.run import RunConfig
from tests.end_to_end.jobs import FORKED, TORCHRUN, Job
from tests.small_data import SmallData
from tests.training.test_runs import assert_same_final_state, complete, records, summary

NUM_KILLS = 5
NUM_RANKS = 2
SECONDS_TO_END = 120

# Phase -> how many of these phases a rank may live through, and the longest wait, about the phase's duration.
PHASES: dict[str, tuple[int, float]] = {"step": (4, 0.1), "save": (2, 0.3), "load": (1, 0.6)}


# Odd seeds save asynchronously. With torchrun, fourteen of thirty kills are in a save and eight in a load.
@pytest.mark.parametrize(
    ("launcher", "seed"),
    [(FORKED, 0), *(pytest.param(TORCHRUN, seed, marks=pytest.mark.exhaustive) for seed in range(6))],
)
def test_a_run_whose_ranks_are_killed_equals_an_undisturbed_run(
    ranks: Any, small_data: SmallData, tmp_path: Path, launcher: str, seed: int
) -> None:
    # Each killed attempt finishes at most four steps, so that the last attempt has steps to do.
    num_steps = 4 * NUM_KILLS + 3

    def run(name: str) -> RunConfig:
        return small_data.run(
            tmp_path / name,
            parallel={"tensor": 2, "sequence": True},
            model={"hidden_dropout": 0.1},
            training={"num_steps": num_steps, "micro_batch_size": 2},
            evaluation={"interval": None},
            checkpoint={"interval": 2, "keep_last": 2, "resume": True, "asynchronous": seed % 2 == 1},
        )

    undisturbed, killed = run("undisturbed"), run("killed")
    ranks(NUM_RANKS).run(complete, undisturbed)
    job = Job(tmp_path, killed, launcher=launcher)
    try:
        run_killed_attempts(job, tmp_path / "kills.jsonl", seed)
        job.start_ranks(NUM_RANKS, "train", str(job.config))
        assert job.wait(SECONDS_TO_END) == 0, job.output()
    finally:
        job.kill()

    assert_same_final_state(killed, undisturbed)
    compared_keys = ("step", "consumed_samples", "train_loss", "gradient_norm", "learning_rate")
    assert [[record[key] for key in compared_keys] for record in records(killed)] == [
        [record[key] for key in compared_keys] for record in records(undisturbed)
    ]
    assert summary(killed)["final_validation_loss"] == summary(undisturbed)["final_validation_loss"]
    kept = [path.name for path in (tmp_path / "killed" / "checkpoints").glob("iter_*")]
    assert sorted(kept) == [f"iter_{step:07d}" for step in (num_steps - 1, num_steps)]


def run_killed_attempts(job: Job, record: Path, seed: int) -> None:
    """Start the run `NUM_KILLS` times with a rank that kills itself, at least once in every phase."""
    draw = random.Random(seed)
    # The first attempt dies in its second save, so that the next ones have a checkpoint to load.
    later = [*PHASES, list(PHASES)[seed % len(PHASES)]]
    draw.shuffle(later)
    moments = [("save", 2), *((phase, draw.randint(1, PHASES[phase][0])) for phase in later)]
    assert len(moments) == NUM_KILLS
    for phase, number in moments:
        moment = (phase, number, draw.uniform(0, PHASES[phase][1]))
        rank = draw.randrange(NUM_RANKS)
        arguments = (str(record), str(rank), *map(str, moment), str(job.config))
        job.start_ranks(NUM_RANKS, *arguments, module="tests.end_to_end.killed_training")
        assert job.wait(SECONDS_TO_END) == 1, f"{moment}\n{job.output()}"
        assert "-9" in job.output(), f"no rank was killed: {moment}\n{job.output()}"
        assert not job.processes()
        for path in find_checkpoints(job.run_directory / "checkpoints"):
            verify_checkpoint(path)
    kills = [json.loads(line) for line in record.read_text().splitlines()]
    for (phase, _), kill in zip(moments, kills, strict=True):
        assert phase in kill["phases"], kill
        # pytest -rP shows it.
        print(phase, "at its end" if kill["at_end"] else "within", kill["location"])
