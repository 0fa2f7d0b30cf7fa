"""A run's communication counter equals the bytes that leave the network interface of a rank's host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.namespaces import ADDRESSES, INTERFACE, lacking_for_namespaces, two_namespaces
from tests.end_to_end.nodes import write_config
from tests.fork_server import ForkedCommand
from tests.small_data import SmallData

NUM_STEPS = 10
PORT = "29500"  # of the namespaces, which no other process shares

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2, "sequence": True}},
    "data": {"parallel": {}, "optimizer": {"distributed": True}},
}
# The counter follows the ring convention. For a reduce-scatter gloo reduces the entire tensor on every rank,
# and each rank discards the other ranks' shards.
GLOO_REDUCE_SCATTER = 2
# Ethernet 14, IP 20 and TCP with time stamps 32 bytes before each 1,448 at most (a packet of 1,500), and
# as many in answer to each packet of the other side, which sends as much. Most are far larger until they
# reach a real card, and many are answered at once.
MOST_OVERHEAD = 2 * 66 / 1448
# Messages of the failure watchdog and of the run to the store, in a few seconds.
STORE_BYTES = 200_000


@pytest.mark.system_packages("iproute2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_interface_sends_the_counted_bytes(layout: str, small_data: SmallData, tmp_path: Path) -> None:
    if reason := lacking_for_namespaces():
        pytest.skip(reason)
    config = write_config(
        small_data,
        tmp_path,
        model={"hidden_size": 192, "ffn_hidden_size": 256},
        training={"num_steps": NUM_STEPS},
        evaluation={"interval": None},
        logging={"communication_counter": True},
        **LAYOUTS[layout],
    )
    with two_namespaces() as names:
        place = {"MASTER_ADDR": ADDRESSES[0], "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": PORT}
        ranks = [
            ForkedCommand(
                *(name, INTERFACE, tmp_path / "sent", NUM_STEPS, config),
                module="tests.end_to_end.measured_training",
                environment={**os.environ, **place, "RANK": str(rank), "GLOO_SOCKET_IFNAME": INTERFACE},
            )
            for rank, name in enumerate(names)
        ]
        try:
            assert [rank.wait(120) for rank in ranks] == [0, 0], "".join(rank.errors() for rank in ranks)
        finally:
            for rank in ranks:
                rank.kill()
    entries = json.loads((tmp_path / "run" / "summary.json").read_text())["communication_bytes_sent"]
    for rank in range(2):
        (counts,) = (entry["sent"] for entry in entries if rank in entry["ranks"])
        expected = sum(
            num_bytes * (GLOO_REDUCE_SCATTER if operation.startswith("reduce_scatter") else 1)
            for group in counts.values()
            for operation, num_bytes in group.items()
        )
        sent = int((tmp_path / f"sent-{rank}").read_text())
        print(f"{layout}, rank {rank}: {sent:,} bytes, {sent / expected:.4f} of those counted")
        assert expected > 50 * STORE_BYTES
        assert expected <= sent <= expected * (1 + MOST_OVERHEAD) + STORE_BYTES, counts
