"""What is started once for all tests that use it: a cluster, and a run to compare with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.nodes import losses, write_config
from tests.end_to_end.slurm_cluster import SlurmCluster, lacking_for_slurm, running_cluster
from tests.end_to_end.test_launching import shell
from tests.small_data import SmallData


@pytest.fixture(scope="session")
def local_losses(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the run of `write_config` by two processes of torchrun on this machine."""
    folder = tmp_path_factory.mktemp("local")
    done = shell("launch/torchrun.sh", "2", str(write_config(small_data, folder)))
    assert done.returncode == 0, done.stderr
    found = losses(folder / "run")
    assert len(found) == 4
    return found


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A SLURM cluster of two nodes, which are not lost however busy this machine is."""
    if reason := lacking_for_slurm():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster
