"""Replicas of weights: the checksum, and the report of a replica that drifts with its ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sas_megatron.config.run import RunConfig
from sas_megatron.training import replicas
from sas_megatron.training.replicas import checksum, describe_drift
from tests.small_data import SmallData
from tests.training.test_runs import LAYOUTS, complete, records, summary
from tests.training.training_runs import complete_with_callback

NORM = "decoder.final_layernorm.weight"
PROJECTION = "decoder.layers.1.self_attention.linear_proj.weight"


@settings(deadline=None, derandomize=True, database=None)
@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 50))
def test_a_checksum_changes_with_any_bit_of_one_element(
    data: st.DataObject, dtype: torch.dtype, length: int
) -> None:
    values = data.draw(st.lists(st.floats(-4, 4, width=16), min_size=length, max_size=length))
    index = data.draw(st.integers(0, length - 1))
    tensor = torch.tensor(values, dtype=dtype)
    changed = tensor.clone()
    changed.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])[index] ^= 1  # the lowest bit
    assert checksum(changed) != checksum(tensor)
    assert checksum(tensor.clone()) == checksum(tensor)
    if changed[index] != changed[0]:
        swapped = changed.clone()
        swapped[[0, index]] = swapped[[index, 0]]
        assert checksum(swapped) != checksum(changed), "the order of elements matters"


def test_a_checksum_does_not_depend_on_the_block_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch.randn(7, 11, generator=torch.Generator().manual_seed(3))
    expected = checksum(tensor)
    monkeypatch.setattr(replicas, "_ELEMENTS_PER_BLOCK", 10)
    assert checksum(tensor) == expected
    assert checksum(tensor.t().contiguous().t()) == expected, "strides do not matter"


def test_the_description_names_tensors_and_ranks_that_differ() -> None:
    by_rank = [{(0, NORM, None): 5, (0, PROJECTION, rank % 2): rank % 2} for rank in range(4)]
    by_rank[2][0, NORM, None] = 6
    by_rank[3][0, PROJECTION, 1] = 9
    assert describe_drift(by_rank) == (
        f"{NORM} differs between ranks 0-1, 3 and rank 2; {PROJECTION} differs between rank 1 and rank 3"
    )
    assert describe_drift(by_rank, max_names=1).endswith("; and 1 more")


def complete_with_drift(config: RunConfig, drifting_rank: int, name: str) -> None:
    """Complete a run on this rank; one bit of a weight of `drifting_rank` changes after step 3."""

    def flip_bit(run: Any) -> None:
        if run.progress.step == 3:
            weights = dict(run.engine.model_chunks[0].named_parameters())[name].detach()
            # The lowest bit may be lost in the rounding of the next update.
            weights.view(torch.int32).view(-1)[-1] ^= 1 << 10

    complete_with_callback(config, drifting_rank, flip_bit)


@pytest.mark.parametrize(
    ("parallel", "name"), [({}, PROJECTION), ({"tensor": 2, "sequence": True}, NORM)], ids=["data", "tensor"]
)
def test_a_replica_that_drifts_ends_the_run_and_is_named(
    ranks: Any, small_data: SmallData, tmp_path: Path, parallel: dict[str, Any], name: str
) -> None:
    config = small_data.run(
        tmp_path / "run",
        parallel=parallel,
        training={"num_steps": 8, "micro_batch_size": 2},
        health={"replica_check_interval": 2},
    )
    expected = rf"after step 4 replicas of the same weights differ: .*{name} differs between rank 0 and"
    with pytest.raises(AssertionError, match=expected):
        ranks(2).run(complete_with_drift, config, 1, name)
    assert [(record["step"], record["event"]) for record in records(config, "health")] == [(4, "drift")]


@pytest.mark.parametrize(
    "layout", ["tensor 2 with dropout", "pipeline 2 interleaved, data 2, overlapped", "DeepSpeed"]
)
def test_equal_replicas_are_not_reported(
    ranks: Any, small_data: SmallData, tmp_path: Path, layout: str
) -> None:
    deepspeed = (2, {"training": {"engine": "deepspeed"}, "deepspeed": {"zero_stage": 2}})
    world_size, sections = deepspeed if layout == "DeepSpeed" else LAYOUTS[layout]
    training = {**sections.get("training", {}), "num_steps": 4}
    config = small_data.run(
        tmp_path / "run", **{**sections, "training": training}, health={"replica_check_interval": 1}
    )
    ranks(world_size).run(complete, config)
    assert summary(config)["exit_reason"] == "finished"
    assert not records(config, "health")
