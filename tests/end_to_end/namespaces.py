"""Two network namespaces, connected by a pair of virtual interfaces, which count the bytes that they send."""

from __future__ import annotations

import contextlib
import subprocess
import uuid
from collections.abc import Iterator

from tests.system_packages import lacking

PROGRAMS = {"ip": "iproute2"}
INTERFACE = "veth-test"
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def missing_for_namespaces() -> str | None:
    """Return what this machine lacks to create namespaces; None if it lacks nothing."""
    if reason := lacking(PROGRAMS, needs_root=True):
        return reason
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode != 0:
        return "lacks the permission to create network namespaces (CAP_SYS_ADMIN)"
    return None


@contextlib.contextmanager
def two_namespaces() -> Iterator[list[str]]:
    """Create the namespaces and yield their names; each has only its loopback and `INTERFACE`."""
    run = uuid.uuid4().hex[:8]
    names = [f"test-{run}-{end}" for end in range(2)]
    try:
        for name in names:
            _ip("netns", "add", name)
        ends = (("name", INTERFACE, "netns", name) for name in names)
        _ip("link", "add", *next(ends), "type", "veth", "peer", *next(ends))
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
