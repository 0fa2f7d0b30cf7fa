"""Clusters, started once for all tests that use them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.slurm_cluster import SlurmCluster, lacking_for_slurm, running_cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """A SLURM cluster of two nodes."""
    if reason := lacking_for_slurm():
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster
