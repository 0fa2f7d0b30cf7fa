"""Fixtures that are created once per session: a SLURM cluster, and the losses of a run to compare with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.nodes import losses, write_config
from tests.end_to_end.slurm_cluster import SlurmCluster, missing_for_slurm, running_cluster
from tests.fork_server import ForkedCommand
from tests.small_data import SmallData


@pytest.fixture(scope="session")
def local_losses(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of the run of `write_config`, trained by two forked processes."""
    folder = tmp_path_factory.mktemp("local")
    config = write_config(small_data, folder)
    launched = (folder / "pids", 2, "sas_megatron", "train", config)
    ranks = ForkedCommand(*launched, module="tests.end_to_end.fork_launcher")
    assert ranks.wait(120) == 0, ranks.errors()
    local = losses(folder / "run")
    assert len(local) == 4
    return local


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """Start a SLURM cluster of two nodes, whose time limit is long enough for a busy machine."""
    if reason := missing_for_slurm():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster
