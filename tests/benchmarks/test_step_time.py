from __future__ import annotations

import gc
import weakref
from typing import Any

from sas_megatron.benchmarks.step_time import measure_step_seconds
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.config.run import RunConfig
from tests.rank_pool import in_layout
from tests.run_configs import small_config


def test_a_deeper_model_is_measured_as_slower_on_two_ranks() -> None:
    parallel = {"tensor": 2}
    shallow = small_config(parallel=parallel, data={"sequence_length": 32})
    deep = small_config(parallel=parallel, data={"sequence_length": 32}, model={"num_layers": 16})
    rounds = measure_step_seconds([shallow, deep], rounds=2)
    assert len(rounds) == 2
    for seconds in rounds:
        assert len(seconds) == 2
        assert 0 < seconds[0] < seconds[1]


def engines_held(configs: list[RunConfig]) -> list[int]:
    """How many engines are there as each is built, when Python does not look for circles by itself."""
    import pytest

    from sas_megatron.benchmarks.step_time import time_rounds
    from sas_megatron.training import engine as engines

    made: list[weakref.ref[Any]] = []
    held: list[int] = []
    assemble = engines.assemble

    def noted(config: RunConfig) -> Any:
        held.append(sum(engine() is not None for engine in made))
        engine = assemble(config)
        made.append(weakref.ref(engine))
        return engine

    topology = in_layout(ParallelConfig())
    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engines, "assemble", noted)
            time_rounds(configs, 2, topology)
    finally:
        gc.enable()
    return held


def test_one_model_at_a_time_is_held(ranks: Any) -> None:
    assert ranks(1).run(engines_held, [small_config(), small_config()]) == [[0, 0, 0, 0]]
