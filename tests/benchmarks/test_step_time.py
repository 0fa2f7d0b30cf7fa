from __future__ import annotations

from sas_megatron.benchmarks.step_time import measure_step_seconds
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
