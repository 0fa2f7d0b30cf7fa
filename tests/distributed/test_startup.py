"""What a world is initialized with: the device for NCCL, and no groups that nothing uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from sas_megatron.config.parallel import ParallelConfig
from tests.rank_pool import in_layout


class _StopError(Exception):
    """Raised instead of initializing the world."""


@pytest.mark.parametrize(("name", "expected"), [("cpu", None), ("cuda:1", torch.device("cuda", 1))])
def test_nccl_is_initialized_with_its_device(
    name: str, expected: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sas_megatron.distributed.topology import joined_topology

    def refuse(_backend: str, **options: Any) -> None:
        assert options["device_id"] == expected
        raise _StopError

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with (
        pytest.raises(_StopError),
        joined_topology(ParallelConfig(), device=torch.device(name), seed=1, timeout_minutes=1),
    ):
        pass


def gloo_groups(config: ParallelConfig) -> list[str]:
    """Return the names of Megatron-core's gloo groups that exist beside the groups of the backend."""
    from megatron.core import parallel_state

    in_layout(config)
    return [name for name, value in vars(parallel_state).items() if "GLOO" in name and value is not None]


def test_no_gloo_groups_are_created_beside_the_groups_of_the_backend(ranks: Any) -> None:
    assert ranks(2).run(gloo_groups, ParallelConfig(tensor=2)) == [[], []]
