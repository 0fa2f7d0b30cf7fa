"""The communication counter of a run agrees with the bytes that each rank's network interface sends."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.namespaces import ADDRESSES, INTERFACE, missing_for_namespaces, two_namespaces
from tests.end_to_end.nodes import write_config
from tests.fork_server import ForkedCommand
from tests.small_data import SmallData

NUM_STEPS = 10
PORT = "29500"  # always free, because each test has its own namespaces

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2, "sequence": True}},
    "data": {"parallel": {}, "optimizer": {"distributed": True}},
}
# The counter assumes ring algorithms. For a reduce-scatter, gloo instead reduces the full tensor to every
# rank, and each rank discards the shards of the others.
GLOO_REDUCE_SCATTER = 2
# Headers of Ethernet (14 bytes), IP (20) and TCP with time stamps (32) for each packet of 1,448 payload
# bytes, and the same for the acknowledgement of each received packet. This is an upper bound: virtual
# interfaces send larger packets, and several packets are acknowledged together.
MAX_OVERHEAD = 2 * 66 / 1448
# Traffic of the failure watchdog and other uses of the store.
STORE_BYTES = 200_000


@pytest.mark.system_packages("iproute2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_interface_sends_the_counted_bytes(layout: str, small_data: SmallData, tmp_path: Path) -> None:
    if reason := missing_for_namespaces():
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
        variables = {"MASTER_ADDR": ADDRESSES[0], "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": PORT}
        ranks = [
            ForkedCommand(
                *(name, INTERFACE, tmp_path / "sent", NUM_STEPS, config),
                module="tests.end_to_end.measured_training",
                environment={**os.environ, **variables, "RANK": str(rank), "GLOO_SOCKET_IFNAME": INTERFACE},
            )
            for rank, name in enumerate(names)
        ]
        try:
            assert [rank.wait(120) for rank in ranks] == [0, 0], "".join(rank.errors() for rank in ranks)
        finally:
            for rank in ranks:
                rank.kill()
    counters = json.loads((tmp_path / "run" / "summary.json").read_text())["communication_bytes_sent"]
    for rank in range(2):
        (counter,) = (entry["sent"] for entry in counters if rank in entry["ranks"])
        expected = sum(
            num_bytes * (GLOO_REDUCE_SCATTER if operation.startswith("reduce_scatter") else 1)
            for group in counter.values()
            for operation, num_bytes in group.items()
        )
        sent = int((tmp_path / f"sent-{rank}").read_text())
        print(f"{layout}, rank {rank}: {sent:,} bytes, {sent / expected:.4f} of the counted bytes")
        assert expected > 50 * STORE_BYTES
        assert expected <= sent <= expected * (1 + MAX_OVERHEAD) + STORE_BYTES, counter
