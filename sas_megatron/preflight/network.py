"""Checks of host names, interfaces and ports on one node. Imports no torch."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping

from sas_megatron.config.errors import FieldError
from sas_megatron.platform.launcher import check_port_is_free, check_rendezvous_address, resolve_address
from sas_megatron.preflight.finding import Finding, failure, fine, warning


def check_host_name(environment: Mapping[str, str]) -> Finding:
    """Check the address that this host's name resolves to, which gloo uses unless an interface is set."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError as error:
        return warning(
            "host name",
            f"{name} does not resolve ({error.strerror})",
            f"add {name} to /etc/hosts, or set the interface: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME",
        )
    return judge_host_name(name, address, environment)


def judge_host_name(name: str, address: str, environment: Mapping[str, str]) -> Finding:
    """Judge whether other nodes of the run, if any, can reach the address of this host's name."""
    master = environment.get("MASTER_ADDR", "localhost")
    is_single_node = master in ("localhost", name) or _is_loopback(master)
    if _is_loopback(address) and not is_single_node and "GLOO_SOCKET_IFNAME" not in environment:
        return warning(
            "host name",
            f"{name} resolves to {address}, which gloo would use and other nodes cannot reach",
            f"set the external address of {name} in /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    return fine("host name", f"{name} is {address}")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def check_interfaces(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check that the network interfaces set for gloo and NCCL exist."""
    present = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        value = environment.get(variable, "")
        if not value or value.startswith("^"):
            continue  # NCCL excludes the interfaces after ^
        exact = value.startswith("=") or variable == "GLOO_SOCKET_IFNAME"
        patterns = value.removeprefix("=").split(",")
        if not any(
            name == pattern or (not exact and name.startswith(pattern))
            for name in present
            for pattern in patterns
        ):
            yield failure(
                "interfaces",
                f"{variable}={value} is not among {', '.join(present)}",
                f"set {variable} to the one that reaches the other nodes (see `ip address`)",
            )
        else:
            yield fine("interfaces", f"{variable}={value}")


def check_rendezvous(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check that MASTER_ADDR resolves, and that MASTER_PORT is free on rank 0 and reachable elsewhere."""
    if "MASTER_ADDR" not in environment:
        return
    address, port = environment["MASTER_ADDR"], environment.get("MASTER_PORT", "29500")
    try:
        resolve_address(address)
        check_rendezvous_address()
        # If torchrun has started this process, its agent listens on the port.
        if environment.get("RANK") == "0" and "TORCHELASTIC_RUN_ID" not in environment:
            check_port_is_free(int(port))
    except FieldError as error:
        yield failure("rendezvous", f"{error.field}={error.value}: {error.rule}", error.remedy)
    else:
        yield fine("rendezvous", f"{address}, port {port}")
