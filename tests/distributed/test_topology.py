"""The position of a rank, the seeds of its dropout, and the clean shutdown of the process groups."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import torch

from sas_megatron.config.parallel import ParallelConfig
from tests.conftest import ROOT
from tests.rank_pool import in_layout

SINGLE_PROCESS = """
import torch.distributed as dist
from sas_megatron.platform.device import prepare_device
device = prepare_device()
from megatron.core import parallel_state
from sas_megatron.config.parallel import ParallelConfig
from sas_megatron.distributed.topology import joined_topology
settings = {"device": device, "seed": 1, "timeout_minutes": 1.5}
with joined_topology(ParallelConfig(), **settings) as topology:
    print(topology.rank, topology.world_size, topology.is_rank0, topology.data_size, topology.tensor_rank)
    print(dist.get_backend(), topology.tensor_group.size(), topology.data_group.size())
    for group in (dist.group.WORLD, *topology.groups().values()):
        print(group._get_backend(device).options._timeout)
print(dist.is_initialized(), parallel_state.model_parallel_is_initialized())
try:
    with joined_topology(ParallelConfig(), **settings):
        raise KeyError("within")
except KeyError as error:
    print(error)
print(dist.is_initialized(), parallel_state.model_parallel_is_initialized())
"""


def test_a_single_process_is_a_world_of_one_rank_and_shuts_down_cleanly() -> None:
    without_launcher = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
    }
    completed = subprocess.run(
        [sys.executable, "-c", SINGLE_PROCESS],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=without_launcher,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines() == [
        "0 1 True 1 0",
        "gloo 1 1",
        # The timeout applies to every group, not only to the world.
        *["0:01:30"] * 5,
        "False False",
        "'within'",
        "False False",
    ]


def _position_and_draws(tensor: int) -> dict[str, Any]:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    topology = in_layout(ParallelConfig(tensor=tensor))
    outside = torch.rand(3).tolist()
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3).tolist()
    return {
        "position": (topology.rank, topology.tensor_rank, topology.data_rank, topology.is_rank0),
        "sizes": (topology.world_size, topology.tensor_group.size(), topology.data_size),
        "outside": outside,
        "inside": inside,
    }


def test_consecutive_ranks_form_a_tensor_group_and_the_others_a_data_group(ranks: Any) -> None:
    by_rank = ranks(4).run(_position_and_draws, 2)
    assert [reported["position"] for reported in by_rank] == [
        (0, 0, 0, True),
        (1, 1, 0, False),
        (2, 0, 1, False),
        (3, 1, 1, False),
    ]
    assert {reported["sizes"] for reported in by_rank} == {(4, 2, 2)}


def test_dropout_is_equal_on_tensor_ranks_only_outside_tensor_parallel_regions(ranks: Any) -> None:
    by_rank = ranks(4).run(_position_and_draws, 2)
    outside, inside = ([reported[where] for reported in by_rank] for where in ("outside", "inside"))
    assert outside[0] == outside[1] != outside[2] == outside[3]
    assert len({tuple(draws) for draws in (*inside, outside[0], outside[2])}) == 6
