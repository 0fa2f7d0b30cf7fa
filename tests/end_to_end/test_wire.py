"""What a run's wire ledger says that a rank sends is what leaves its host's network interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.namespaces import ADDRESSES, INTERFACE, lacking_for_namespaces, two_namespaces
from tests.end_to_end.nodes import started_nodes, write_config
from tests.small_data import SmallData

NUM_STEPS = 10

# Trains as `sas-megatron train` does, and notes what the interface has sent before the first step and
# after the last, each time with all that went before arrived. (/proc/net/dev is of the own namespace.)
ENTRY = """
import os, sys
from sas_megatron.config.loading import load_run_config
from sas_megatron.platform.device import prepare_device

def bytes_sent():
    with open("/proc/net/dev") as interfaces:
        for line in interfaces:
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                return int(counters.split()[8])

if __name__ == "__main__":
    interface, path, num_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    prepare_device()
    import torch.distributed as dist
    from sas_megatron.training import loop, start
    train_step, readings = loop.train_step, []
    def read():
        dist.barrier()
        readings.append(bytes_sent())
    def measured_step(*args, **kwargs):
        if not readings:
            read()
        result = train_step(*args, **kwargs)
        measured_step.count += 1
        if measured_step.count == num_steps:
            read()
        return result
    measured_step.count, loop.train_step = 0, measured_step
    start.train(load_run_config(sys.argv[4]))
    with open(f"{path}-{os.environ['RANK']}", "w") as file:
        print(readings[1] - readings[0], file=file)
"""

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2, "sequence": True}},
    "data": {"parallel": {}, "optimizer": {"distributed": True}},
}
# The convention of the ledger is that of a ring; for a reduce-scatter gloo reduces everything to every
# rank, and each drops what is not its own.
GLOO_REDUCE_SCATTER = 2
# Ethernet 14, IP 20 and TCP with time stamps 32 bytes before each 1,448 at most (a packet of 1,500), and
# as many in answer to each packet of the other side, which sends as much. Most are far larger until they
# reach a real card, and many are answered at once.
MOST_OVERHEAD = 2 * 66 / 1448
# The roll call and the run's notes in the store, over some seconds.
STORE_BYTES = 200_000


@pytest.mark.parametrize("layout", ["tensor", pytest.param("data", marks=pytest.mark.exhaustive)])
def test_the_interface_sends_what_the_ledger_says(layout: str, small_data: SmallData, tmp_path: Path) -> None:
    if reason := lacking_for_namespaces():
        pytest.skip(reason)
    config = write_config(
        small_data,
        tmp_path,
        model={"hidden_size": 192, "ffn_hidden_size": 256},
        training={"num_steps": NUM_STEPS},
        evaluation={"interval": None},
        logging={"wire_ledger": True},
        **LAYOUTS[layout],
    )
    (tmp_path / "entry.py").write_text(ENTRY)
    with two_namespaces() as names, started_nodes(tmp_path) as nodes:
        for rank, name in enumerate(names):
            nodes.start(
                *("ip", "netns", "exec", name, "torchrun", "--nnodes=2", "--nproc-per-node=1"),
                *(f"--node-rank={rank}", f"--master-addr={ADDRESSES[0]}", str(tmp_path / "entry.py")),
                *(INTERFACE, str(tmp_path / "sent"), str(NUM_STEPS), str(config)),
                GLOO_SOCKET_IFNAME=INTERFACE,
            )
        assert nodes.wait() == [0, 0], nodes.output()
    ledgers = json.loads((tmp_path / "run" / "summary.json").read_text())["wire_bytes_sent"]
    for rank in range(2):
        (ledger,) = (entry["sent"] for entry in ledgers if rank in entry["ranks"])
        expected = sum(
            num_bytes * (GLOO_REDUCE_SCATTER if operation.startswith("reduce_scatter") else 1)
            for group in ledger.values()
            for operation, num_bytes in group.items()
        )
        sent = int((tmp_path / f"sent-{rank}").read_text())
        print(f"{layout}, rank {rank}: {sent:,} bytes, {sent / expected:.4f} of the ledger's")
        assert expected > 50 * STORE_BYTES
        assert expected <= sent <= expected * (1 + MOST_OVERHEAD) + STORE_BYTES, ledger
