"""The environment variables of launchers: rank, world size and rendezvous address. Imports no torch.

torchrun, deepspeed   set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which torch reads
plain srun            sets SLURM_*, from which `set_rank_from_slurm` derives these variables
a single process      has none of these variables; it is a world of one rank
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sas_megatron.config.errors import FieldError

# Below the ports that the kernel assigns to outgoing connections (32768 and up).
FIRST_PORT, NUM_PORTS = 20000, 10000


def launched_world_size() -> int:
    """Return the number of ranks that the launcher has set, before any process group exists.

    Raises:
        FieldError: WORLD_SIZE is not a positive integer.
    """
    return _read_positive_integer("WORLD_SIZE", "1", maximum=2**31)


def master_port() -> int:
    """Return the port on which the first node listens.

    Raises:
        FieldError: MASTER_PORT is not a port number.
    """
    return _read_positive_integer("MASTER_PORT", "29500", maximum=2**16 - 1)


def _read_positive_integer(name: str, default: str, *, maximum: int) -> int:
    value = os.environ.get(name, default)
    if value.isdecimal() and 1 <= int(value) <= maximum:
        return int(value)
    raise FieldError(
        name,
        value,
        f"must be a positive integer, at most {maximum}",
        "correct it, or leave it to the launcher",
    )


def is_rank0() -> bool:
    """Return whether this process is rank 0, as a single process always is."""
    return os.environ.get("RANK", "0") == "0"


def is_first_on_node() -> bool:
    """Return whether this process is the first rank of its node, as a single process always is."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def remove_empty_log_folder() -> None:
    """Remove the folder of logs that torchrun has created for this rank and its parents, if they are empty.

    Without the option --log-dir, torchrun creates it among the temporary files, and leaves it there.
    """
    error_file = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", ""))
    folders = error_file.parents
    top = next((folder for folder in folders if folder.name.startswith("torchelastic_")), None)
    if top is not None and top.parent == Path(tempfile.gettempdir()):
        with contextlib.suppress(OSError):  # another rank has not ended yet, or the folder contains logs
            for folder in folders[: folders.index(top) + 1]:
                folder.rmdir()


def set_rank_from_slurm() -> None:
    """Under plain srun, set the variables from which torch reads the rank and the rendezvous address.

    Under another launcher, and in a single process, nothing is changed.

    Raises:
        FieldError: SLURM does not know the address of rank 0, this host cannot resolve it, or rank 0 cannot
            listen on its port.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    os.environ.update(_torch_variables(os.environ))
    resolve_address(os.environ["MASTER_ADDR"])
    if is_rank0():
        check_port_is_free(master_port())


def check_rendezvous_address() -> None:
    """Check MASTER_ADDR and MASTER_PORT on this node, which launch/torchrun.sh and deepspeed.sh do first.

    The first node must be able to listen on MASTER_PORT, and the other nodes must reach it within
    JOIN_SECONDS. Without NODE_RANK only the address is resolved.

    Raises:
        FieldError: The address or the port cannot be used.
    """
    if "MASTER_ADDR" not in os.environ or "RANK" in os.environ:
        return
    address, port = os.environ["MASTER_ADDR"], master_port()
    resolve_address(address)
    node_rank = os.environ.get("NODE_RANK", "")
    if node_rank == "0":
        check_port_is_free(port)
    elif node_rank:
        wait_for_listener(address, port, seconds=join_seconds())


def join_seconds() -> float:
    """Return JOIN_SECONDS, how long nodes wait for each other (50 by default).

    Raises:
        FieldError: JOIN_SECONDS is not a positive number.
    """
    value = os.environ.get("JOIN_SECONDS", "50")
    with contextlib.suppress(ValueError):
        if 0 < float(value) < float("inf"):
            return float(value)
    raise FieldError("JOIN_SECONDS", value, "must be a number above 0", "use 50, for example")


def resolve_address(address: str) -> str:
    """Return the IP address of a host.

    Raises:
        FieldError: This host cannot resolve it.
    """
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise FieldError(
            "MASTER_ADDR",
            address,
            f"cannot be resolved on {socket.gethostname()} ({error.strerror})",
            "set it to the first node's IP address, or to a name that every node can resolve",
        ) from None
    return str(found[0][4][0])


def check_port_is_free(port: int) -> None:
    """Check that this host can listen on `port`.

    Raises:
        FieldError: It cannot, usually because another process listens there.
    """
    with socket.socket() as probe:
        # torch's store sets the same option: connections of an ended run in TIME_WAIT do not block the port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise FieldError(
                "MASTER_PORT",
                port,
                f"is not available on {socket.gethostname()} ({error.strerror})",
                "set another port, the same on all nodes, or end the process that uses it",
            ) from None


def wait_for_listener(address: str, port: int, *, seconds: float) -> None:
    """Wait until a process listens on `port` of `address`.

    Raises:
        FieldError: None does within `seconds`.
    """
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
                    f"accepted no connection from {socket.gethostname()} on MASTER_PORT={port} "
                    f"within {seconds:g} s ({error.strerror or error})",
                    "start the first node as well, open the port between the nodes, or raise JOIN_SECONDS",
                ) from None
            time.sleep(0.2)


def _torch_variables(slurm: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that torch reads, for one task of a SLURM job step."""
    return {
        "RANK": slurm["SLURM_PROCID"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or _address_of_first_node(slurm["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(slurm_job_port(slurm)),
    }


def slurm_job_port(slurm: Mapping[str, str]) -> int:
    """Return a port for a job step that other jobs and steps on the same node are unlikely to use."""
    number = int(slurm["SLURM_JOB_ID"]) * 7 + int(slurm.get("SLURM_STEP_ID", "0"))
    return FIRST_PORT + number % NUM_PORTS


def _address_of_first_node(nodes: str) -> str:
    """Return the address of the first node from SLURM's controller; its node names may not be resolvable."""
    first = _scontrol("show", "hostnames", nodes).split()[0]
    match = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", first))
    return match[1] if match else first


def _scontrol(*arguments: str) -> str:
    try:
        completed = subprocess.run(
            ["scontrol", *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        raise FieldError(
            "MASTER_ADDR",
            None,
            f"is not set, and SLURM does not report the address ({str(detail).strip()})",
            "set it to the first node's address, with MASTER_PORT",
        ) from None
    return completed.stdout
