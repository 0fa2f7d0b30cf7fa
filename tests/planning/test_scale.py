"""One process estimates a run on a thousand ranks as fast as one on the ranks of a single replica."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sas_megatron.config.loading import build_run_config
from tests.conftest import ROOT

# Pipeline 8 times tensor 8.
REPLICA_RANKS = 64
NUM_REPLICAS = 16
MICROBATCHES = 16


def _estimate(num_replicas: int) -> tuple[float, Any]:
    from sas_megatron.config.loading import read_run_tree
    from sas_megatron.planning.hardware_file import load_hardware
    from sas_megatron.planning.run_estimate import estimate_run

    tree = read_run_tree(ROOT / "configs" / "125m" / "sas.yaml")
    tree["model"] |= {"num_layers": 16, "hidden_size": 4096, "ffn_hidden_size": 11008}
    tree["attention"] |= {"num_heads": 32, "head_dim": 128, "num_kv_heads": 8, "simulated_head_dim": 192}
    tree["parallel"] = {"tensor": 8, "sequence": True, "pipeline": 8, "virtual_pipeline": 2}
    tree["training"] |= {
        "global_batch_size": MICROBATCHES * num_replicas,
        "micro_batch_size": 1,
        "recompute": "selective",
    }
    config, hardware = build_run_config(tree), load_hardware("h100")
    # Processor time, which does not depend on other load of this machine.
    start = time.process_time()
    estimate = estimate_run(config, world_size=REPLICA_RANKS * num_replicas, hardware=hardware)
    return time.process_time() - start, estimate


# Both times are measured in one run, since they depend on the machine.
@pytest.mark.exhaustive
def test_1024_ranks_are_estimated_in_the_time_of_one_replica(separate_process: Any) -> None:
    replica_seconds, _ = separate_process(_estimate, 1)
    seconds, estimate = separate_process(_estimate, NUM_REPLICAS)
    assert seconds < 1.5 * replica_seconds
    # The first, second and last of eight stages; 1,024 ranks hold 16 replicas of the model.
    assert [report.rank for report in estimate.reports] == [0, 128, 896]
    assert [report.num_layers for report in estimate.reports] == [2, 2, 2]
    assert estimate.data_parallel == 16
    first, middle, last = estimate.reports
    assert first.num_parameters > middle.num_parameters < last.num_parameters
    assert all(report.step.group_bytes("pipeline") > 0 for report in estimate.reports)
    assert estimate.step.bubble == (8 - 1) / 2 / MICROBATCHES
    # The last stage holds the fewest microbatches, but also the logits over its vocabulary.
    assert first.peak_bytes > middle.peak_bytes
