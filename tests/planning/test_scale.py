"""One process estimates a run on a thousand ranks in less than a minute."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sas_megatron.config.loading import build_run_config
from tests.conftest import ROOT

SECONDS = 60.0


def _estimate_1024() -> tuple[float, Any]:
    from sas_megatron.config.loading import read_run_tree
    from sas_megatron.planning.hardware_file import load_hardware
    from sas_megatron.planning.run_estimate import estimate_run

    tree = read_run_tree(ROOT / "configs" / "125m" / "sas.yaml")
    tree["model"] |= {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008}
    tree["attention"] |= {"num_heads": 32, "head_dim": 128, "num_kv_heads": 8, "simulated_head_dim": 192}
    tree["parallel"] = {"tensor": 8, "sequence": True, "pipeline": 8, "virtual_pipeline": 2}
    tree["training"] |= {"global_batch_size": 1024, "micro_batch_size": 1, "recompute": "selective"}
    # Processor time, which does not depend on other load of this machine.
    start = time.process_time()
    estimate = estimate_run(build_run_config(tree), world_size=1024, hardware=load_hardware("h100"))
    return time.process_time() - start, estimate


@pytest.mark.exhaustive  # on a busy machine processor time grows as well
def test_1024_ranks_are_estimated_in_less_than_a_minute(separate_process: Any) -> None:
    seconds, estimate = separate_process(_estimate_1024)
    assert seconds < SECONDS
    # The first, second and last of eight stages; 1,024 ranks hold 16 replicas of the model.
    assert [report.rank for report in estimate.reports] == [0, 128, 896]
    assert [report.num_layers for report in estimate.reports] == [4, 4, 4]
    assert estimate.data_parallel == 16
    first, middle, last = estimate.reports
    assert first.num_parameters > middle.num_parameters < last.num_parameters
    assert all(report.step.group_bytes("pipeline") > 0 for report in estimate.reports)
    assert estimate.step.bubble == (8 - 1) / 2 / 64
    # The last stage holds the fewest microbatches, but also the logits over its vocabulary.
    assert first.peak_bytes > middle.peak_bytes
