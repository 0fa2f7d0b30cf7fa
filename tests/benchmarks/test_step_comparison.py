"""The step benchmark compares times with FLOPs."""

from __future__ import annotations

import pytest
import torch

from sas_megatron.benchmarks.step_comparison import compare_steps, with_microbatches
from sas_megatron.costs.flops import causal_half, count_training_flops
from sas_megatron.costs.parameters import count_parameters
from tests import small_attentions as small
from tests.benchmarks.small_ceilings import shrink_ceilings
from tests.planning.forked_ranks import fork_ranks
from tests.run_configs import small_config


def test_times_are_compared_with_flops_and_with_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    fork_ranks(monkeypatch)
    shrink_ceilings(monkeypatch)
    configs = {
        name: with_microbatches(small_config(attention=attention), 3)
        for name, attention in (("mha", small.MHA), ("sas", small.SAS))
    }
    result = compare_steps(configs, device=torch.device("cpu"), rounds=2)
    assert result["time_over_flops"] == pytest.approx(result["time_ratio"] / result["flops_ratio"])
    for name, config in configs.items():
        row = result["rows"][name]
        assert row["tokens"] == 3 * 2 * 12
        assert row["parameters"] == sum(count_parameters(config).values())
        terms = count_training_flops(config)
        assert row["flops"] == row["tokens"] * sum(terms.values())
        at_peak = row["flops"] / result["peak_flops_per_second"]
        assert row["flops_utilization"] == pytest.approx(at_peak / row["seconds"])
        halved = sum(causal_half(terms, sequence_length=12).values())
        assert row["flops_utilization_causal"] / row["flops_utilization"] == pytest.approx(
            halved / sum(terms.values())
        )
    assert result["flops_ratio"] == result["rows"]["sas"]["flops"] / result["rows"]["mha"]["flops"]
