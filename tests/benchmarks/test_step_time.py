"""The time of a step is the median after the first step, on the slowest rank."""

from __future__ import annotations

import gc
import os
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from sas_megatron.benchmarks import step_time
from sas_megatron.benchmarks.step_time import measure_step_seconds
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout
from tests.run_configs import small_config
from tests.selection import exhaustive


@exhaustive  # another process may take the processors for the length of a step
def test_a_deeper_model_is_measured_as_slower_on_two_ranks() -> None:
    parallel = {"tensor": 2}
    shallow = small_config(parallel=parallel, data={"sequence_length": 32})
    deep = small_config(parallel=parallel, data={"sequence_length": 32}, model={"num_layers": 16})
    rounds = measure_step_seconds([shallow, deep], rounds=2)
    assert len(rounds) == 2
    for seconds in rounds:
        assert len(seconds) == 2
        assert 0 < seconds[0] < seconds[1]


# The steps of one config take 1, 7, 3 and 2 s, of the other ten times as long. The first step is a warm-up.
STEP_SECONDS = (1.0, 7.0, 3.0, 2.0)


def measure_with_fake_clock(configs: list[RunConfig]) -> list[list[float]]:
    """Return the rounds on a rank, with engines that advance a clock by known seconds."""
    from sas_megatron.training import build

    clock = SimpleNamespace(now=0.0)

    class FakeEngine:
        """An engine that takes a quarter of a step for the microbatches, and the rest for the update."""

        def __init__(self, config: RunConfig) -> None:
            factor = 10.0 if config.model.num_layers == 3 else 1.0
            self.seconds = iter([factor * seconds for seconds in STEP_SECONDS])

        def forward_backward(self, batches: Any, *, num_microbatches: int) -> None:
            assert num_microbatches == 2
            self.step = next(self.seconds)
            clock.now += 0.25 * self.step

        def compute_gradient_norm(self) -> float:
            return 1.5

        def update(self, gradient_norm: float) -> None:
            assert gradient_norm == 1.5
            clock.now += 0.75 * self.step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_time, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        patch.setattr(build, "build_engine", FakeEngine)
        return step_time.time_rounds(configs, 2, in_layout(ParallelConfig()))


def test_the_time_of_a_config_is_the_median_step_after_the_first(ranks: Any) -> None:
    shallow, deep = small_config(), small_config(model={"num_layers": 3})
    (rounds,) = ranks(1).run(measure_with_fake_clock, [shallow, deep])
    assert rounds == [[pytest.approx(3.0), pytest.approx(30.0)]] * 2


def test_the_time_of_a_step_is_that_of_the_slowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(parallel={"tensor": 2})
    calls: list[Any] = []

    def return_seconds(function: Any, *arguments: Any, **options: Any) -> list[list[list[float]]]:
        calls.append((function, arguments, options))
        # Seconds by rank, round and config.
        return [[[1.0, 5.0], [2.0, 2.0]], [[3.0, 4.0], [1.0, 6.0]]]

    monkeypatch.setattr(step_time, "run_on_ranks", return_seconds)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert measure_step_seconds([config, config], rounds=2) == [[3.0, 5.0], [2.0, 6.0]]
    assert calls == [(step_time._time_on_rank, ([config, config], 2, False), {"world_size": 2, "threads": 3})]


def count_live_engines(configs: list[RunConfig]) -> list[int]:
    """Return the number of live engines whenever one is built, without automatic garbage collection."""
    from sas_megatron.benchmarks.step_time import time_rounds
    from sas_megatron.training import build

    built: list[weakref.ref[Any]] = []
    live: list[int] = []
    build_engine = build.build_engine

    def assemble_and_count(config: RunConfig) -> Any:
        live.append(sum(engine() is not None for engine in built))
        engine = build_engine(config)
        built.append(weakref.ref(engine))
        return engine

    topology = in_layout(ParallelConfig())
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "build_engine", assemble_and_count)
            time_rounds(configs, 2, topology)
    finally:
        gc.enable()
    return live


def test_only_one_model_is_live_at_a_time(ranks: Any) -> None:
    assert ranks(1).run(count_live_engines, [small_config(), small_config()]) == [[0, 0, 0, 0]]
