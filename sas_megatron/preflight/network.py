"""Names, interfaces and ports, as one node sees them. No torch."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping

from sas_megatron.config.errors import FieldError
from sas_megatron.platform.launcher import check_meeting_place, check_port_is_free, resolve
from sas_megatron.preflight.finding import Finding, failure, fine, warning


def check_own_name(environment: Mapping[str, str]) -> Finding:
    """gloo takes the address that this host's name stands for, unless told an interface."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError as error:
        return warning(
            "own name",
            f"{name} does not resolve ({error.strerror})",
            f"add {name} to /etc/hosts, or name the interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME",
        )
    return judge_own_name(name, address, environment)


def judge_own_name(name: str, address: str, environment: Mapping[str, str]) -> Finding:
    """Whether other nodes, where there are some, can reach what the name stands for."""
    master = environment.get("MASTER_ADDR", "localhost")
    is_alone = master in ("localhost", name) or _is_loopback(master)
    if _is_loopback(address) and not is_alone and "GLOO_SOCKET_IFNAME" not in environment:
        return warning(
            "own name",
            f"{name} is {address}, which other nodes cannot reach, and gloo would give it to them",
            f"give {name} its outer address in /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    return fine("own name", f"{name} is {address}")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def check_interfaces(environment: Mapping[str, str]) -> Iterator[Finding]:
    """The interfaces that gloo and NCCL are told to use must be there."""
    present = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        told = environment.get(variable, "")
        if not told or told.startswith("^"):
            continue  # NCCL's way to say: none of these
        exact = told.startswith("=") or variable == "GLOO_SOCKET_IFNAME"
        wanted = told.removeprefix("=").split(",")
        if not any(
            name == want or (not exact and name.startswith(want)) for name in present for want in wanted
        ):
            yield failure(
                "interfaces",
                f"{variable}={told} is not among {', '.join(present)}",
                f"set {variable} to one of them (ip address shows which reaches the other nodes)",
            )
        else:
            yield fine("interfaces", f"{variable}={told}")


def check_meeting(environment: Mapping[str, str]) -> Iterator[Finding]:
    """MASTER_ADDR and MASTER_PORT: known here, free where rank 0 will listen, reachable from elsewhere."""
    if "MASTER_ADDR" not in environment:
        return
    address, port = environment["MASTER_ADDR"], environment.get("MASTER_PORT", "29500")
    try:
        resolve(address)
        check_meeting_place()
        # A launcher that has started this process listens there itself.
        if environment.get("RANK") == "0" and "TORCHELASTIC_RUN_ID" not in environment:
            check_port_is_free(int(port))
    except FieldError as error:
        yield failure("meeting place", f"{error.field}={error.value}: {error.rule}", error.remedy)
    else:
        yield fine("meeting place", f"{address}, port {port}")
