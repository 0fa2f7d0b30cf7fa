"""The loop benchmark separates the time of the loop from the time of the engine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sas_megatron.config.run import RunConfig
from tests.fork_server import run_command
from tests.rank_pool import in_layout
from tests.run_configs import small_config


class _SlowEngine:
    """An engine that takes 30 ms for each of the three calls of a step, and reads two batches."""

    def forward_backward(self, batches: Any, *, num_microbatches: int) -> list[Any]:
        time.sleep(0.03)
        return [next(batches) for _ in range(num_microbatches)]

    def compute_gradient_norm(self) -> float:
        time.sleep(0.03)
        return 1.5

    def update(self, gradient_norm: float) -> None:
        time.sleep(0.03)


def test_time_between_the_calls_of_the_engine_belongs_to_the_loop() -> None:
    from sas_megatron.benchmarks.loop import EngineTimer

    def batches() -> Any:
        while True:
            time.sleep(0.01)
            yield "batch"

    engine: Any = _SlowEngine()
    timer = EngineTimer(engine, torch.device("cpu"))
    for _step in range(3):
        assert engine.forward_backward(batches(), num_microbatches=2) == ["batch", "batch"]
        engine.update(engine.compute_gradient_norm())
        time.sleep(0.05)
    steps = timer.steps()
    assert len(steps) == 2
    for step in steps:
        # A sleep takes at least the given time, and longer on a busy machine.
        assert step["engine"] >= 0.09
        assert step["loop: batches"] >= 0.02
        assert step["loop: the rest"] >= 0.05
        assert step["loop"] == pytest.approx(step["loop: batches"] + step["loop: the rest"])
        assert step["step"] == pytest.approx(step["engine"] + step["loop"])


def ratio_with_slow_reads(config: RunConfig, folder: Path) -> dict[str, Any]:
    from sas_megatron.benchmarks.loop import prepare_run
    from sas_megatron.benchmarks.read_delay import count_steps, measure_read_delay

    topology = in_layout(config.parallel)
    run = prepare_run(config, folder, num_steps=count_steps(config, rounds=1))
    return measure_read_delay(run, topology, seconds=0.1, rounds=1)


def test_reads_that_take_longer_than_the_step_are_seen(ranks: Any, tmp_path: Path) -> None:
    config = small_config(
        model={"vocab_size": 512, "num_layers": 1}, training={"global_batch_size": 2, "micro_batch_size": 2}
    )
    (result,) = ranks(1).run(ratio_with_slow_reads, config, tmp_path)
    assert result["samples_per_step"] == 2
    assert result["delayed_seconds"] >= 0.2
    assert result["ratio"] == pytest.approx(result["delayed_seconds"] / result["plain_seconds"])


def test_the_command_measures_a_real_run_and_removes_its_files(tmp_path: Path) -> None:
    config = small_config(model={"vocab_size": 512}, training={"global_batch_size": 2})
    (tmp_path / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    done = run_command("bench", "loop", "config.yaml", "--steps", "3", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    # The last step has no following step, so it is left out.
    assert result["steps"] == 2
    assert 0 < result["share_of_step"] < 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
