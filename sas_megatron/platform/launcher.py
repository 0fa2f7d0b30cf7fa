"""What the launcher tells a process of its place, before torch is imported.

torchrun, deepspeed -> RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as torch reads them
bare srun           -> SLURM_*, from which `take_place` makes those
a bare process      -> nothing: a world of one
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping

from sas_megatron.config.errors import FieldError

# Below those that the kernel gives to outgoing connections (32768 and up).
FIRST_PORT, NUM_PORTS = 20000, 10000


def launched_world_size() -> int:
    """Ranks of this run, as the launcher's environment tells before any process group exists.

    Raises:
        FieldError: it tells no number of ranks.
    """
    return _read_whole_number("WORLD_SIZE", "1", most=2**31)


def master_port() -> int:
    """The port at which the first node listens; raises `FieldError` where MASTER_PORT is none."""
    return _read_whole_number("MASTER_PORT", "29500", most=2**16 - 1)


def _read_whole_number(name: str, default: str, *, most: int) -> int:
    value = os.environ.get(name, default)
    if value.isdecimal() and 1 <= int(value) <= most:
        return int(value)
    raise FieldError(
        name, value, f"must be a whole number from 1 to {most}", "set it, or leave it to the launcher"
    )


def is_first_rank() -> bool:
    """Whether this is rank 0, or a process alone."""
    return os.environ.get("RANK", "0") == "0"


def take_place() -> None:
    """Finds this process's place under bare srun, and puts it where torch looks for it.

    Under another launcher, and in a process alone, nothing is changed.

    Raises:
        FieldError: SLURM cannot tell where rank 0 is, this host does not know it, or rank 0 cannot be there.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    os.environ.update(_place_in_step(os.environ))
    resolve(os.environ["MASTER_ADDR"])
    if is_first_rank():
        check_port_is_free(master_port())


def check_meeting_place() -> None:
    """What launch/torchrun.sh and launch/deepspeed.sh ask on each node before they start processes.

    The first node must be free to listen at MASTER_ADDR:MASTER_PORT; the others must reach it within
    JOIN_SECONDS. Where no NODE_RANK tells which it is, only the name is looked up.

    Raises:
        FieldError: it is not so.
    """
    if "MASTER_ADDR" not in os.environ or "RANK" in os.environ:
        return
    address, port = os.environ["MASTER_ADDR"], master_port()
    resolve(address)
    node_rank = os.environ.get("NODE_RANK", "")
    if node_rank == "0":
        check_port_is_free(port)
    elif node_rank:
        wait_for_listener(address, port, seconds=join_seconds())


def join_seconds() -> float:
    """How long nodes wait for each other: JOIN_SECONDS, by default below a minute.

    Raises:
        FieldError: it is no time.
    """
    value = os.environ.get("JOIN_SECONDS", "50")
    with contextlib.suppress(ValueError):
        if 0 < float(value) < float("inf"):
            return float(value)
    raise FieldError("JOIN_SECONDS", value, "must be a number above 0", "use 50, say")


def resolve(address: str) -> str:
    """The IP address of a host.

    Raises:
        FieldError: this host cannot find it.
    """
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise FieldError(
            "MASTER_ADDR",
            address,
            f"is not known on {socket.gethostname()} ({error.strerror})",
            "give the first node's address, or a name that every node resolves",
        ) from None
    return str(found[0][4][0])


def check_port_is_free(port: int) -> None:
    """Raises `FieldError` where another process of this host listens at `port`."""
    with socket.socket() as probe:
        # As torch's store does: what an ended run left in TIME_WAIT is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise FieldError(
                "MASTER_PORT",
                port,
                f"cannot be listened at on {socket.gethostname()} ({error.strerror})",
                "choose another, the same on all nodes, or end the process that has it",
            ) from None


def wait_for_listener(address: str, port: int, *, seconds: float) -> None:
    """Raises `FieldError` where nothing at `address` answers at `port` for so long."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise FieldError(
                    "MASTER_ADDR",
                    address,
                    f"did not answer {socket.gethostname()} at MASTER_PORT={port} within {seconds:g} s "
                    f"({error.strerror or error})",
                    "start the first node too, open the port between the nodes, or raise JOIN_SECONDS",
                ) from None
            time.sleep(0.2)


def _place_in_step(slurm: Mapping[str, str]) -> dict[str, str]:
    """torch's variables for one task of a job step."""
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or _address_of_first_node(slurm["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(port_of_job(slurm)),
    }


def port_of_job(slurm: Mapping[str, str]) -> int:
    """A port that jobs, and the steps of one, are unlikely to share on a node."""
    number = int(slurm["SLURM_JOB_ID"]) * 7 + int(slurm.get("SLURM_STEP_ID", "0"))
    return FIRST_PORT + number % NUM_PORTS


def _address_of_first_node(nodes: str) -> str:
    """Node names of SLURM need not resolve: its controller knows the addresses."""
    first = _scontrol("show", "hostnames", nodes).split()[0]
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", first))
    return found[1] if found else first


def _scontrol(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise FieldError(
            "MASTER_ADDR",
            None,
            f"cannot be had from SLURM ({str(detail).strip()})",
            "set it to the first node's address, with MASTER_PORT",
        ) from None
    return done.stdout
